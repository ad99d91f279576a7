"""Memory planning: whether a recipe fits its GPUs, computed before anything starts.

Parameters are counted on the real model on the meta device; activations come from a formula that
lists what our layers save, which a test compares with autograd. Speed is not predicted.
"""

from phi4.model.cards import CARDS, Card, card_named
from phi4.plan.fit import check_fit
from phi4.plan.memory import MemoryPlan, StageMemory, make_plan
from phi4.plan.recompute import recompute_mistake

__all__ = [
    "CARDS",
    "Card",
    "MemoryPlan",
    "StageMemory",
    "card_named",
    "check_fit",
    "make_plan",
    "recompute_mistake",
]
