"""What a checkpoint holds besides weights: the recipe, and where the run stood.

The history lists every change of a `schedule` key with the step after which it took effect, so the
recipe of any step can be told from the newest checkpoint alone.
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
    """A schedule key that changed on resume; values as JSON holds them."""

    step: int
    """Completed steps when it changed."""
    key: str
    before: Any
    after: Any


class Skip(msgspec.Struct, frozen=True):
    """Data that was skipped: by a roll back, whose undone steps drew it, or by the recipe."""

    after_step: int
    """The step that the run went back to; the next one begins behind the skipped data."""
    last_undone: int
    """Steps after_step + 1 up to this one were undone; after_step where the recipe asked."""
    units: int
    """Units of the stream that were skipped."""
    rows: int
    """The same in rows of the recipe at that time."""
    reason: str


class Numerics(msgspec.Struct, frozen=True):
    """What the next step is compared with: it says which losses and gradients are spikes."""

    losses: tuple[float, ...] = ()
    """Of the last good steps, oldest first."""
    log_norms: tuple[float, ...] = ()
    """Natural logarithms of their gradient norms."""
    bad_in_row: int = 0
    """Steps up to now, without a good one between, whose update was skipped."""


class FP8Fallback(msgspec.Struct, frozen=True):
    """A layer that left FP8."""

    step: int
    """Completed steps when it did."""
    layer: int
    """Of the whole model, from 0."""
    reason: str


class RunState(msgspec.Struct, frozen=True, kw_only=True):
    """Plain values, the same on every rank, saved in every checkpoint."""

    step: int = 0
    consumed_tokens: int = 0
    data: dict | None = None
    """Ledger of the loader; None before the first step of a run that begins one."""
    ledger_from: str = ""
    """Checkpoint whose ledger the run began with; empty for a run that began one."""
    weights_from: str = ""
    """Checkpoint whose weights the run began with; empty for weights drawn from the seed."""
    weights_manifest_sha256: str = ""
    """Of that checkpoint's manifest, which holds the hashes of its files."""
    history: tuple[Change, ...] = ()
    skips: tuple[Skip, ...] = ()
    roll_backs: int = 0
    """How often the run was rolled back, on its way here and on ways that were undone."""
    numerics: Numerics = Numerics()
    fp8_fallbacks: tuple[FP8Fallback, ...] = ()
    """Also of steps that a roll back undid: what is known of a layer is kept."""

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
    """The recipe a checkpoint was written under.

    Raises:
        CheckpointError: the file is missing.
    """
    text = read_checkpoint_file(checkpoint, RECIPE_FILE)
    return recipe_from_toml(text, where=str(checkpoint / RECIPE_FILE))


def read_state(checkpoint: Path) -> RunState:
    """The run state in a checkpoint.

    Raises:
        CheckpointError: missing or damaged.
    """
    text = read_checkpoint_file(checkpoint, STATE_FILE)
    try:
        return RunState.from_json(text)
    except msgspec.DecodeError as error:
        raise CheckpointError(f"{checkpoint / STATE_FILE} is damaged: {error}") from None


def _with_json_values(entry: Any) -> Any:
    """An entry of the history; until version 0.1 it held Python literals under `old` and `new`."""
    if not isinstance(entry, dict) or "old" not in entry:
        return entry
    try:
        before, after = (ast.literal_eval(entry[name]) for name in ("old", "new"))
    except (KeyError, ValueError, SyntaxError, TypeError) as error:
        raise msgspec.DecodeError(f"history: {error}") from None
    rest = {name: value for name, value in entry.items() if name not in ("old", "new")}
    return rest | {"before": before, "after": after}
