"""What a run needs besides model and optimizer to go on: step, tokens, data position, history.

The history lists every change of a `schedule` key with the step at which it took effect; changes of
`identity` keys are refused, `free` keys change without a trace.
"""

from collections.abc import Callable

import msgspec

from phi4.config import Recipe, changed_keys
from phi4.errors import ConfigError
from phi4.train.schedule import decay_end, next_rate

STATE_FILE = "state.json"
RECIPE_FILE = "recipe.toml"


class Change(msgspec.Struct, frozen=True):
    """A schedule key that changed on resume."""

    step: int
    key: str
    old: str
    new: str


class RunState(msgspec.Struct, frozen=True, kw_only=True):
    """Plain values, the same on every rank, saved in every checkpoint."""

    step: int = 0
    consumed_tokens: int = 0
    data: dict | None = None
    """Ledger of the loader; None before the first step of a run that begins one."""
    ledger_from: str = ""
    """Checkpoint whose ledger the run began with; empty for a run that began one."""
    history: tuple[Change, ...] = ()

    def to_json(self) -> str:
        """Text of state.json."""
        return msgspec.json.format(msgspec.json.encode(self), indent=1).decode()

    @staticmethod
    def from_json(text: str) -> "RunState":
        """Inverse of `to_json`."""
        return msgspec.json.decode(text, type=RunState)


def with_changes(
    state: RunState, old: Recipe, new: Recipe, *, allow: bool, say: Callable[[str], None]
) -> RunState:
    """The state of a run that goes on under another recipe.

    Args:
        state: as saved.
        old: the recipe it was saved under.
        new: the recipe asked for.
        allow: whether `--change` was given.
        say: takes a line about the learning rate where the change moves it: run.steps does without
            naming it when optim.decay is 0.

    Raises:
        ConfigError: an identity key differs, or a schedule key does and allow is False.
    """
    changes = changed_keys(old, new)
    if changes["identity"]:
        raise ConfigError(
            f"the run was started with {_listed(changes['identity'])}; it would be another "
            "training: restore the value, or use another run.dir (run.init_from takes the weights)"
        )
    rates = _rate_change(state, old, new)
    if changes["schedule"] and not allow:
        consequence = f" ({rates})" if rates else ""
        raise ConfigError(
            f"the run was started with {_listed(changes['schedule'])}{consequence}; pass --change "
            "to go on with the new value from this step"
        )
    if rates:
        say(rates)
    added = tuple(
        Change(state.step, key, repr(before), repr(after))
        for key, (before, after) in sorted(changes["schedule"].items())
    )
    return msgspec.structs.replace(state, history=state.history + added)


def _rate_change(state: RunState, old: Recipe, new: Recipe) -> str | None:
    """What becomes of the learning rate and of its decay, where either changes."""
    before, after = (
        next_rate(recipe, step=state.step, consumed_tokens=state.consumed_tokens)
        for recipe in (old, new)
    )
    unit = new.optim.schedule_unit
    old_end, new_end = decay_end(old), decay_end(new)
    moved = unit == old.optim.schedule_unit and old_end != new_end
    if before == after and not moved:
        return None
    line = f"learning rate of step {state.step + 1}: {before:.4g} before, {after:.4g} now"
    if moved:
        line += f"; the decay ended after {old_end:,} {unit}, now after {new_end:,}"
        if new.optim.decay == 0:
            line += f"; optim.decay={old_end} would leave it"
    return line


def _listed(changes: dict) -> str:
    return ", ".join(f"{key}={old!r}, now {new!r}" for key, (old, new) in sorted(changes.items()))
