"""What a resumed run may change: `schedule` keys, recorded with the step, never `identity` keys."""

from collections.abc import Callable
from typing import Any

import msgspec

from phi4.config import Recipe, changed_keys
from phi4.errors import ConfigError
from phi4.rundir.state import Change, Numerics, RunState
from phi4.train.schedule import decay_end, next_rate


def with_changes(
    state: RunState, old: Recipe, new: Recipe, *, allow: bool, say: Callable[[str], None]
) -> RunState:
    """The state of a run that resumes under another recipe.

    Args:
        state: as saved.
        old: the recipe it was saved under.
        new: the recipe to resume with.
        allow: whether `--change` was given.
        say: prints a line if the learning rate changes; run.steps changes it too when optim.decay
            is 0.

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
            "to continue with the new value from this step"
        )
    if rates:
        say(rates)
    # Spike statistics of the old schedule do not apply to the new one.
    numerics = Numerics() if changes["schedule"] else state.numerics
    added = tuple(
        Change(state.step, key, _as_json(before), _as_json(after))
        for key, (before, after) in sorted(changes["schedule"].items())
    )
    return msgspec.structs.replace(state, history=state.history + added, numerics=numerics)


def _rate_change(state: RunState, old: Recipe, new: Recipe) -> str | None:
    """A line on the changes of the learning rate and of its decay; None if neither changes."""
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
            line += f"; optim.decay={old_end} keeps the old end"
    return line


def _as_json(value: Any) -> Any:
    """A key's value after a round trip through JSON, so that it equals what a checkpoint reads."""
    return msgspec.json.decode(msgspec.json.encode(value))


def _listed(changes: dict) -> str:
    return ", ".join(f"{key}={old!r}, now {new!r}" for key, (old, new) in sorted(changes.items()))
