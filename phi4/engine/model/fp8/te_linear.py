"""megatron-core's Transformer Engine parallel linears, without pickles in their state.

Imported only if Transformer Engine is installed: without it megatron-core's classes cannot be
subclassed. Our own norm stays in front of them, so that parameters have the same names as in bf16.
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
