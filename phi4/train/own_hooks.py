"""The hooks of every run, in the order in which they are called."""

from collections.abc import Sequence

from phi4.train.evaluation import HeldOutLoss
from phi4.train.fp8_canary import fp8_canary
from phi4.train.hooks import Hook, HookFactory, RunContext
from phi4.train.ledger_record import LedgerRecord
from phi4.train.meter import meter
from phi4.train.ownership import Ownership
from phi4.train.reliability.guard import NumericsGuard
from phi4.train.reliability.stragglers import stragglers


def _ledger_record(context: RunContext) -> Sequence[Hook]:
    if context.recipe.data.weigh_by == "units":
        return []
    return [LedgerRecord(context.recipe, context.platform)]


OWN_HOOKS: tuple[HookFactory, ...] = (
    lambda context: [Ownership(context.lease)],
    meter,
    lambda context: [NumericsGuard(context)],
    lambda context: [
        HeldOutLoss(
            context.recipe,
            context.engine,
            context.objective,
            context.held_out,
            context.requests,
            context.phases,
        )
    ],
    _ledger_record,
    stragglers,
    fp8_canary,
)
"""Hooks of every run, called in this order and before the caller's hooks."""
