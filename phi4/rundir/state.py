"""A checkpoint's content besides weights: the recipe and the state of the run.

The history lists every change of a `schedule` key with the step after which it took effect, so the
recipe of any step can be derived from the newest checkpoint alone.
"""

import ast
from pathlib import Path
from typing import Any

import msgspec

from phi4.config import Recipe, recipe_from_toml
from phi4.errors import CheckpointError
from phi4.rundir.checkpoints import read_checkpoint_file
from phi4.rundir.names import RECIPE_FILE, STATE_FILE


class Change(msgspec.Struct, frozen=True):
    """A schedule key that changed on resume; values as in JSON."""

    step: int
    """Completed steps when it changed."""
    key: str
    before: Any
    after: Any


class Skip(msgspec.Struct, frozen=True):
    """Data that was skipped: by a rollback, whose undone steps drew it, or by the recipe."""

    after_step: int
    """The step that the run returned to; the next one begins after the skipped data."""
    last_undone: int
    """Steps after_step + 1 up to this one were undone; equal to after_step for a skip in the
    recipe."""
    units: int
    """Units of the stream that were skipped."""
    rows: int
    """The same in rows of the recipe in effect at that time."""
    reason: str


class Numerics(msgspec.Struct, frozen=True):
    """Recent statistics that decide whether the next step's loss and gradient are spikes."""

    losses: tuple[float, ...] = ()
    """Losses of the last good steps, oldest first."""
    log_norms: tuple[float, ...] = ()
    """Natural logarithms of their gradient norms."""
    bad_in_row: int = 0
    """Consecutive steps up to now whose update was skipped."""


class FP8Fallback(msgspec.Struct, frozen=True):
    """A layer that stopped using FP8."""

    step: int
    """Completed steps at that time."""
    layer: int
    """Index of the layer in the full model, from 0."""
    reason: str


class RunState(msgspec.Struct, frozen=True, kw_only=True):
    """State of a run as plain values, equal on every rank, saved in every checkpoint."""

    step: int = 0
    consumed_tokens: int = 0
    data: dict | None = None
    """Ledger of the loader; None before the first step of a run that starts a new one."""
    ledger_from: str = ""
    """Checkpoint whose ledger the run started with; empty for a new ledger."""
    weights_from: str = ""
    """Checkpoint whose weights the run started with; empty for weights initialised from the
    seed."""
    weights_manifest_sha256: str = ""
    """Hash of that checkpoint's manifest, which holds the hashes of its files."""
    history: tuple[Change, ...] = ()
    skips: tuple[Skip, ...] = ()
    roll_backs: int = 0
    """Number of rollbacks of the run, including those that a later rollback undid."""
    numerics: Numerics = Numerics()
    fp8_fallbacks: tuple[FP8Fallback, ...] = ()
    """Includes those of undone steps, because they remain valid."""

    def to_json(self) -> str:
        """Text of state.json."""
        return msgspec.json.format(msgspec.json.encode(self), indent=1).decode()

    @staticmethod
    def from_json(text: str) -> "RunState":
        """Inverse of `to_json`; reads the histories of earlier versions too.

        Raises:
            msgspec.DecodeError: the text is not a state.
        """
        tree = msgspec.json.decode(text, type=dict[str, Any])
        history = tree.get("history")
        if isinstance(history, list):
            tree["history"] = [_with_json_values(entry) for entry in history]
        return msgspec.convert(tree, RunState)


def read_recipe(checkpoint: Path) -> Recipe:
    """Return the recipe that a checkpoint was written under.

    Raises:
        CheckpointError: the file is missing.
    """
    text = read_checkpoint_file(checkpoint, RECIPE_FILE)
    return recipe_from_toml(text, where=str(checkpoint / RECIPE_FILE))


def read_state(checkpoint: Path) -> RunState:
    """Return the run state in a checkpoint.

    Raises:
        CheckpointError: missing or damaged.
    """
    text = read_checkpoint_file(checkpoint, STATE_FILE)
    try:
        return RunState.from_json(text)
    except msgspec.DecodeError as error:
        raise CheckpointError(
            f"{checkpoint / STATE_FILE} is damaged: {error}; use another checkpoint"
        ) from None


def _with_json_values(entry: Any) -> Any:
    """Convert an entry of the history; until version 0.1 it held Python literals under `old` and
    `new`."""
    if not isinstance(entry, dict) or "old" not in entry:
        return entry
    try:
        before, after = (ast.literal_eval(entry[name]) for name in ("old", "new"))
    except (KeyError, ValueError, SyntaxError, TypeError) as error:
        raise msgspec.DecodeError(f"history: {error}") from None
    rest = {name: value for name, value in entry.items() if name not in ("old", "new")}
    return rest | {"before": before, "after": after}
