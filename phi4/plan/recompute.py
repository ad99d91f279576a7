"""Check whether the recipe's recompute saves enough memory to justify its cost."""

from phi4.config import with_overrides
from phi4.plan.memory import MemoryPlan, make_plan

LEAST_SAVING = 0.01
"""Fraction of a stage's bytes; recompute that saves less only costs time."""
_WORK = {"selective": "core attention", "full": "every layer"}


def recompute_mistake(plan: MemoryPlan) -> str | None:
    """Return one line if recompute saves less than LEAST_SAVING on every stage, else None."""
    granularity = plan.recipe.recompute.granularity
    if granularity == "none":
        return None
    recipe = with_overrides(plan.recipe, ["recompute.granularity=none"])
    without = make_plan(recipe, plan.num_gpus, plan.card, plan.gpus_per_node)
    pairs = zip(without.stages, plan.stages, strict=True)
    kept, recomputed = max(pairs, key=lambda pair: 1 - pair[1].total / pair[0].total)
    saved = kept.total - recomputed.total
    if saved >= LEAST_SAVING * kept.total:
        return None
    verb = f"saves {_gib(saved)}" if saved > 0 else f"takes {_gib(-saved)} more"
    return (
        f"recompute.granularity={granularity} computes {_WORK[granularity]} twice and {verb}: "
        f"stage {kept.pp_rank} needs {_gib(recomputed.total)} with it, {_gib(kept.total)} without; "
        "use recompute.granularity=none"
    )


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"
