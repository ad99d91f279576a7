"""megatron-core's column and row parallel linears, with their three products in FP8.

Everything around the products is megatron's.
"""

from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear

from phi4.engine.model.fp8.linear_products import FP8Products, Groups, Splits

_ALWAYS: dict[str, object] = {
    "bias": None,
    "gradient_accumulation_fusion": True,
    "grad_output_buffer": None,
}


class FP8ColumnLinear(FP8Products, ColumnParallelLinear):
    """A linear whose outputs are split over tp."""

    def _splits_over(self, tensor: Groups, context: Groups) -> Splits:
        gathers = self.tp_group if self.sequence_parallel else None
        before = (*tensor, *context) if self.sequence_parallel else context
        return Splits(before, context, (), tensor, gathers)

    def _expected_arguments(self) -> dict[str, object]:
        return _ALWAYS | {
            "allreduce_dgrad": self.allreduce_dgrad,
            "sequence_parallel": self.sequence_parallel,
            "tp_group": self.tp_group,
            "wgrad_deferral_limit": None,
        }


class FP8RowLinear(FP8Products, RowParallelLinear):
    """A linear whose inputs are split over tp; megatron sums its outputs over tp."""

    def _splits_over(self, tensor: Groups, context: Groups) -> Splits:
        return Splits(context, context, tensor, ())

    def _expected_arguments(self) -> dict[str, object]:
        return _ALWAYS | {
            "allreduce_dgrad": False,
            "sequence_parallel": False,
            "tp_group": None,
        }
