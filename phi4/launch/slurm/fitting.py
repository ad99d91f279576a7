"""Check that a recipe runs on every number of nodes that Slurm may choose."""

from collections.abc import Sequence

from phi4.config import Recipe
from phi4.config.rules import violations
from phi4.errors import LayoutError
from phi4.launch.slurm.request import NodeRange

_TRIED_COUNTS = 4096


def require_fit(
    recipe: Recipe,
    nodes: NodeRange,
    tasks_per_node: int,
    stage_violations: Sequence[str] = (),
) -> None:
    """Raise an error for a request that does not run on some allowed number of nodes.

    The global batch is fixed, so the data-parallel size must divide it for every count.

    Raises:
        LayoutError: names the first count that fails, why, and the counts that work.
    """

    def broken(count: int) -> list[str]:
        return violations(recipe, count * tasks_per_node)

    rules = [*violations(recipe), *stage_violations]
    if rules:
        raise LayoutError("; ".join(rules))
    failing = next((count for count in nodes.counts if broken(count)), None)
    if failing is None:
        return
    # A larger data-parallel size than the batch leaves ranks without rows.
    most = max(nodes.most, recipe.batch.global_batch_size * recipe.parallel.model_parallel_size)
    fitting = [count for count in range(1, min(most, _TRIED_COUNTS) + 1) if not broken(count)]
    raise LayoutError(
        f"--nodes={nodes} may give {failing} nodes of {tasks_per_node} ranks: "
        f"{'; '.join(broken(failing))}; {_remedy(recipe, nodes, fitting)}"
    )


def _remedy(recipe: Recipe, nodes: NodeRange, fitting: list[int]) -> str:
    if recipe.parallel.data and nodes.least != nodes.most:
        return "parallel.data=0 uses all available nodes"
    if not fitting:
        return "no number of nodes works; change the ranks per node or the layout"
    shown = ", ".join(map(str, fitting[:12])) + (", ..." if len(fitting) > 12 else "")
    return f"these numbers of nodes work: {shown}"
