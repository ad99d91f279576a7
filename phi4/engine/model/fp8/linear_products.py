"""The three products of a linear, in FP8, and their gradients.

The gradient of the weight is added to main_grad in fp32. With sequence parallelism the input is
cast before it is gathered, so one byte per number is sent; the backward pass also keeps FP8.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist

from phi4.engine.model.fp8.casts import (
    FP8Matrix,
    cast,
    cast_whole,
    gathered_columns,
    gathered_rows,
)
from phi4.engine.model.fp8.lost_values import Cast, LostValues
from phi4.engine.model.fp8.product import product
from phi4.engine.model.fp8.recipe import VALUE_DTYPE, Scaling
from phi4.engine.model.hook_arguments import refuse
from phi4.engine.model.weight_gradients import AddsItsOwnGradient

# Shape legend: T tokens, I and O a linear's input and output width on this rank.

Groups = tuple[dist.ProcessGroup, ...]


@dataclass
class FP8Counts:
    """Counters of a linear since it was built.

    Attributes:
        products: number of products in FP8, of all three kinds.
        weight_casts: number of casts of the weight.
    """

    products: int = 0
    weight_casts: int = 0


class Splits(NamedTuple):
    """The groups whose ranks hold other parts of a linear's matrices.

    Attributes:
        input_tokens: splits of the input as it arrives, before a gather.
        output_tokens: splits of the output.
        inputs: splits of the input's columns, and of the weight's.
        outputs: splits of the output's columns, and of the weight's rows.
        gathers: the group that the input is gathered over, under sequence parallelism.
    """

    input_tokens: Groups
    output_tokens: Groups
    inputs: Groups
    outputs: Groups
    gathers: dist.ProcessGroup | None = None


class WeightCasts(NamedTuple):
    """A weight cast for its two products."""

    forward_OI: FP8Matrix
    backward_IO: FP8Matrix


class FP8Products(ABC):
    """The three products of a linear; a mixin in front of megatron-core's two parallel linears.

    Args:
        args, kwargs: of megatron-core's linear.
        scaling: scaling of all casts.
        context_group: ranks that hold other tokens of the same rows.

    Attributes:
        counts: counters of the products.
        is_plain: whether megatron-core's own products in the weight's dtype are used instead.
        lost: counts what the casts lose while it is set.
    """

    weight: torch.nn.Parameter
    training: bool
    tp_group: dist.ProcessGroup

    def __init__(self, *args, scaling: Scaling, context_group: dist.ProcessGroup, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self._scaling = scaling
        self._splits = self._splits_over(_split(self.tp_group), _split(context_group))
        self._weight_casts: WeightCasts | None = None
        self.counts = FP8Counts()
        self.is_plain = False
        self.lost: LostValues | None = None

    @abstractmethod
    def _splits_over(self, tensor: Groups, context: Groups) -> Splits:
        """Return how these groups split the matrices; either is empty if it has one rank."""

    @abstractmethod
    def _expected_arguments(self) -> dict[str, object]:
        """Return arguments of megatron-core's local product that are not read here, each with the
        value it must have."""

    def forget_weight(self) -> None:
        """Invalidate the cached cast after a change of the weight."""
        self._weight_casts = None

    def weight_casts(self) -> WeightCasts:
        """Return the weight in FP8, cast on first use.

        Collectives: those of `cast`.
        """
        if self._weight_casts is None:
            self.counts.weight_casts += 1
            weight_OI, splits = self.weight.detach(), self._splits
            both = self._both(weight_OI, splits.inputs, splits.outputs, "weight")
            self._weight_casts = WeightCasts(*both)
        return self._weight_casts

    def cast_input(self, x_TI: torch.Tensor) -> tuple[FP8Matrix, FP8Matrix]:
        """Cast the input: [T, I] for the forward product, and [I, T] for the weight's gradient."""
        splits = self._splits
        return self._both(x_TI, splits.inputs, splits.input_tokens, "input")

    def cast_gradient(self, grad_TO: torch.Tensor) -> tuple[FP8Matrix, FP8Matrix]:
        """Cast the output's gradient: [T, O] for the input's, and [O, T] for the weight's."""
        splits = self._splits
        return self._both(grad_TO, splits.outputs, splits.output_tokens, "gradient")

    def output(self, x_TI: FP8Matrix, dtype: torch.dtype) -> torch.Tensor:
        """Return x w^T, [T, O]; under sequence parallelism x is this rank's part of the tokens.

        Collectives: one all-gather over tp under sequence parallelism.
        """
        if self._splits.gathers is not None:
            x_TI = gathered_rows(
                x_TI, self._splits.gathers, have_own_scales=self._scaling.name != "tensorwise"
            )
        return self._product(x_TI, self.weight_casts().forward_OI, dtype, is_exact=False)

    def input_gradient(self, grad_TO: FP8Matrix, dtype: torch.dtype) -> torch.Tensor:
        """Return dy w, [T, I]: this rank's part of a sum over tp if the outputs are split."""
        return self._product(grad_TO, self.weight_casts().backward_IO, dtype, is_exact=True)

    def reduced(self, grad_TI: torch.Tensor, reduces: bool) -> torch.Tensor:
        """Return the full gradient of the input as it arrived.

        Collectives: over tp an all-reduce if requested; a reduce-scatter under sequence
            parallelism.
        """
        if self._splits.gathers is not None:
            num_tokens = grad_TI.shape[0] // self._splits.gathers.size()
            part_TI = grad_TI.new_empty(num_tokens, grad_TI.shape[1])
            dist.reduce_scatter_tensor(part_TI, grad_TI, group=self._splits.gathers)
            return part_TI
        if reduces:
            dist.all_reduce(grad_TI, group=self.tp_group)
        return grad_TI

    def weight_gradient(self, grad_OT: FP8Matrix, x_IT: FP8Matrix) -> torch.Tensor:
        """Return dy^T x, [O, I] in fp32.

        Collectives: one all-gather over tp under sequence parallelism.
        """
        if self._splits.gathers is not None:
            x_IT = gathered_columns(
                x_IT, self._splits.gathers, have_own_scales=self._scaling.name == "blockwise"
            )
        # A GPU's rowwise product has no fp32 result.
        is_wide = not grad_OT.data_RK.is_cuda or self._scaling.name == "tensorwise"
        dtype = torch.float32 if is_wide else torch.bfloat16
        return self._product(grad_OT, x_IT, dtype, is_exact=True)

    def _forward_impl(
        self, input: torch.Tensor, weight: torch.Tensor, **others: object
    ) -> torch.Tensor:
        """megatron-core's hook for the local product: [S, B, I] to [S, B, O].

        Raises:
            ConfigError: another argument of megatron-core's asks for something; see `refuse`.
        """
        # Evaluation uses the weights as they are exported, independent of the batch.
        if self.is_plain or not self.training:
            # The parallel linear is behind this class in the order of method resolution.
            return super()._forward_impl(input, weight, **others)  # type: ignore[misc]
        refuse("FP8 linear", others, self._expected_arguments())
        rows_TI, main_grad = input.flatten(0, 1), getattr(weight, "main_grad", None)
        reduces = bool(others["allreduce_dgrad"])
        if main_grad is not None and torch.is_grad_enabled():
            weight = AddsItsOwnGradient.apply(weight)
        rows_TO = _Products.apply(rows_TI, weight, main_grad, self, reduces)
        return rows_TO.unflatten(0, (-1, input.shape[1]))

    def _both(
        self, x_RK: torch.Tensor, of_row: Groups, of_column: Groups, what: Cast
    ) -> tuple[FP8Matrix, FP8Matrix]:
        """Return [R, K] for a product that sums over K, and [K, R] for one that sums over R.

        Args:
            x_RK: this rank's part.
            of_row: groups whose ranks hold other parts of a row.
            of_column: the same for a column.
            what: name of the matrix.
        """
        scaling = self._scaling
        if scaling.name == "tensorwise":
            groups = (*of_row, *of_column)
            both = cast_whole(x_RK, self._dtype(what), groups, scaling.implementation)
            self._count_lost(what, x_RK, both[0])
            return both
        along_rows = self._cast(x_RK, of_row, what)
        if scaling.name == "blockwise" and what == "weight":
            # Its blocks are square.
            return along_rows, along_rows.transposed()
        return along_rows, self._cast(x_RK.t(), of_column, what)

    def _cast(self, x_RK: torch.Tensor, of_row: Groups, what: Cast) -> FP8Matrix:
        scaling = self._scaling
        groups = of_row if scaling.name == "rowwise" else ()
        shared = scaling.shared(x_RK.shape, is_weight=what == "weight")
        matrix = cast(x_RK, self._dtype(what), shared, groups)
        self._count_lost(what, x_RK, matrix)
        return matrix

    def _dtype(self, what: Cast) -> torch.dtype:
        return self._scaling.gradient_dtype if what == "gradient" else VALUE_DTYPE

    def _count_lost(self, what: Cast, x_RK: torch.Tensor, matrix: FP8Matrix) -> None:
        if self.lost is not None:
            self.lost.add(what, x_RK, matrix)

    def _product(
        self, a_MK: FP8Matrix, b_NK: FP8Matrix, dtype: torch.dtype, *, is_exact: bool
    ) -> torch.Tensor:
        self.counts.products += 1
        return product(a_MK, b_NK, dtype, is_exact=is_exact)


class _Products(torch.autograd.Function):
    """Saves the input in FP8, cast for the weight's gradient."""

    @staticmethod
    def forward(
        ctx,
        x_TI: torch.Tensor,
        weight_OI: torch.Tensor,
        main_grad_OI: torch.Tensor | None,
        linear: FP8Products,
        reduces: bool,
    ) -> torch.Tensor:
        for_output_TI, for_weight_IT = linear.cast_input(x_TI)
        ctx.save_for_backward(*for_weight_IT)
        ctx.main_grad_OI, ctx.linear, ctx.reduces = main_grad_OI, linear, reduces
        ctx.dtypes = x_TI.dtype, weight_OI.dtype
        return linear.output(for_output_TI, x_TI.dtype)

    @staticmethod
    def backward(ctx, grad_TO: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Return gradients of the input and, without main_grad, of the weight.

        Collectives: those of the casts; over tp, an all-reduce of the input's gradient, or under
            sequence parallelism its reduce-scatter and an all-gather of the input.
        """
        linear, (x_dtype, weight_dtype) = ctx.linear, ctx.dtypes
        for_input_TO, for_weight_OT = linear.cast_gradient(grad_TO)
        grad_TI = linear.reduced(linear.input_gradient(for_input_TO, x_dtype), ctx.reduces)
        grad_OI = linear.weight_gradient(for_weight_OT, FP8Matrix(*ctx.saved_tensors))
        if ctx.main_grad_OI is None:
            return grad_TI, grad_OI.to(weight_dtype), None, None, None
        ctx.main_grad_OI += grad_OI
        return grad_TI, None, None, None, None


def _split(group: dist.ProcessGroup) -> Groups:
    """Return the group if it has several ranks."""
    return (group,) if group.size() > 1 else ()
