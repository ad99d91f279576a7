"""Recipe and state of a run at any step, reconstructed from its checkpoints."""

from dataclasses import dataclass
from pathlib import Path

from phi4.config import Recipe, parse_recipe
from phi4.errors import CheckpointError
from phi4.rundir.checkpoints import (
    checkpoints_dir,
    complete_checkpoints,
    latest_checkpoint,
    step_of,
)
from phi4.rundir.state import RunState, read_recipe, read_state


@dataclass(frozen=True)
class RunHistory:
    """Recipe and state of a run's checkpoints up to the newest, by step.

    Attributes:
        recipe: recipe of the newest checkpoint.
        state: state of the newest checkpoint; it holds a ledger.
        earlier: states of the checkpoints before it, oldest first.
    """

    recipe: Recipe
    state: RunState
    earlier: tuple[RunState, ...]

    def recipe_at(self, step: int) -> Recipe:
        """Return the recipe in effect at a step, with the sources at their current paths.

        Args:
            step: from 1.
        """
        tree = self.recipe.model_dump(mode="json", exclude_none=True)
        for change in reversed(self.state.history):
            if change.step >= step:
                section, key = change.key.split(".")
                tree[section] |= {key: change.before}
                if change.before is None:
                    del tree[section][key]
        paths = {source.name: source.path for source in self.recipe.data.sources}
        for source in tree["data"]["sources"]:
            source["path"] = paths.get(source["name"], source["path"])
        return parse_recipe(tree, where=f"the recipe of step {step}")

    def units_since(self, step: int) -> int:
        """Return units of the stream from the first one of `step` to the newest checkpoint.

        Units skipped by rollbacks in between are included.
        """
        last = self.state.step
        changed = {change.step + 1 for change in self.state.history if step <= change.step < last}
        begins = sorted({step, *changed})
        units = sum(skip.units for skip in self.state.skips if skip.after_step >= step)
        for begin, end in zip(begins, [*begins[1:], last + 1], strict=True):
            then = self.recipe_at(begin)
            row_units = then.data.sequence_length // then.data.unit_tokens
            units += (end - begin) * then.batch.global_batch_size * row_units
        return units


def read_history(run_dir: Path) -> RunHistory:
    """Read the history of a run that has drawn data.

    Raises:
        CheckpointError: there is no checkpoint, one is damaged, or the newest has no ledger.
    """
    root = checkpoints_dir(run_dir)
    newest = latest_checkpoint(root)
    if newest is None:
        raise CheckpointError(f"{run_dir} has no checkpoint; give the directory of a run")
    state = read_state(newest)
    if state.data is None:
        raise CheckpointError(f"{newest} has no ledger; the run has not drawn any data")
    earlier = [path for path in complete_checkpoints(root) if step_of(path) < step_of(newest)]
    return RunHistory(read_recipe(newest), state, tuple(map(read_state, earlier)))
