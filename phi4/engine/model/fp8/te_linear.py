"""megatron-core's parallel linears of Transformer Engine, without pickles in their state.

Imported only where Transformer Engine is: without it megatron-core's classes cannot be derived
from. Our own norm stays in front of them, so that parameters have the names that they have in bf16.
"""

from megatron.core.extensions.transformer_engine import (
    TEColumnParallelLinear,
    TERowParallelLinear,
)

from phi4.engine.model.fp8.te_state import TELinearState


class TEColumnLinear(TELinearState, TEColumnParallelLinear):
    """A linear whose outputs are split over tp."""


class TERowLinear(TELinearState, TERowParallelLinear):
    """A linear whose inputs are split over tp."""
