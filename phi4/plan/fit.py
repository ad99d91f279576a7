"""Check whether a recipe fits its GPUs, and find changes that would make it fit."""

from collections.abc import Iterator

from phi4.config import Recipe, with_overrides
from phi4.errors import ConfigError, LayoutError
from phi4.model.shape import format_bytes
from phi4.plan.memory import MemoryPlan, StageMemory, make_plan

MOST_REMEDIES = 4


def check_fit(plan: MemoryPlan) -> None:
    """Raise an error for a plan that exceeds its card's memory.

    Raises:
        LayoutError: names the fullest stage, by how much it exceeds, and overrides that fit.
    """
    fullest = fullest_stage(plan)
    excess = fullest.total - plan.card.capacity_bytes
    if excess <= 0:
        return
    fitting = remedies(plan)
    advice = f"these fit: {' | '.join(fitting)}" if fitting else _more_gpus(plan)
    raise LayoutError(
        f"stage {fullest.pp_rank} of {len(plan.stages)} needs {format_bytes(fullest.total)} per "
        f"GPU, {format_bytes(excess)} more than the {format_bytes(plan.card.capacity_bytes)} of "
        f"{plan.card.title}; {advice}"
    )


def fullest_stage(plan: MemoryPlan) -> StageMemory:
    """Return the stage that takes the most bytes."""
    return max(plan.stages, key=lambda stage: stage.total)


def remedies(plan: MemoryPlan) -> list[str]:
    """Overrides under which the recipe fits the same GPUs, cheapest change first."""
    found: list[str] = []
    for overrides in _changes(plan.recipe):
        if len(found) < MOST_REMEDIES and _fits(plan, overrides):
            found.append(" ".join(overrides))
    return found


def _fits(plan: MemoryPlan, overrides: list[str]) -> bool:
    try:
        changed = with_overrides(plan.recipe, overrides)
        other = make_plan(changed, plan.num_gpus, plan.card, plan.gpus_per_node)
    except ConfigError:
        return False
    return fullest_stage(other).total <= plan.card.capacity_bytes


def _changes(recipe: Recipe) -> Iterator[list[str]]:
    single = list(_single_changes(recipe))
    yield from single
    full = "recompute.granularity=full"
    if [full] in single:
        yield from ([*change, full] for change in single if not change[0].startswith("recompute"))


def _single_changes(recipe: Recipe) -> Iterator[list[str]]:
    parallel, rows = recipe.parallel, recipe.batch.micro_batch_size
    if not parallel.distributed_optimizer:
        yield ["parallel.distributed_optimizer=true"]
    if parallel.tensor > 1 and not parallel.sequence:
        yield ["parallel.sequence=true"]
    if rows > 1:
        yield [f"batch.micro_batch_size={rows // 2}"]
    if recipe.recompute.granularity == "none":
        yield ["recompute.granularity=selective"]
    if recipe.recompute.granularity != "full":
        yield ["recompute.granularity=full"]
    for factor in (2, 4):
        yield _pipelined(recipe, parallel.pipeline * factor)
    if parallel.context > 1:
        # Without context parallelism attention needs no mask and keeps no probabilities.
        yield ["parallel.context=1", *_pipelined(recipe, parallel.pipeline * parallel.context)]
    for tensor in range(parallel.tensor + 1, recipe.model.num_key_value_heads + 1):
        yield [f"parallel.tensor={tensor}", "parallel.sequence=true"]
    for factor in (2, 4):
        yield [f"parallel.context={parallel.context * factor}"]


def _pipelined(recipe: Recipe, pipeline: int) -> list[str]:
    change = [f"parallel.pipeline={pipeline}"]
    if recipe.parallel.layers_per_stage is not None:
        # The recipe's list is only valid for its own number of stages.
        stages = pipeline * recipe.parallel.virtual_pipeline
        share, rest = divmod(recipe.model.num_layers, stages)
        counts = [share + (index < rest) for index in range(stages)]
        change.append(f"parallel.layers_per_stage={counts}".replace(" ", ""))
    return change


def _more_gpus(plan: MemoryPlan) -> str:
    return (
        "no single change of micro-batch, tensor, pipeline or context fits, with or without "
        f"recompute.granularity=full; use more than {plan.num_gpus:,} GPUs or a larger card"
    )
