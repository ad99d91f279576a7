"""Cast matrices to FP8, with scales along the dimension that a product sums over.

One scale covers an entire matrix (tensorwise), a row (rowwise), or a block of 1 x 128 or 128 x 128
(blockwise). If ranks hold parts that share a scale, they first agree on the largest magnitude, so
that every layout has the scales of one process.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from phi4_kernels.fp8_cast import cast_tensor

from phi4.engine.model.fp8.scales import saturated, scale_of

# Shape legend: R rows and K columns of a matrix; a product sums over K. r and k: rows and columns
# that share a scale.


class FP8Matrix(NamedTuple):
    """A matrix in FP8.

    Attributes:
        data_RK: the numbers.
        inverse: [R / r, K / k], fp32; a block's numbers times its inverse are the values.
    """

    data_RK: torch.Tensor
    inverse: torch.Tensor

    def values(self) -> torch.Tensor:
        """[R, K], fp32."""
        rows, columns = self.data_RK.shape
        num_down, num_across = self.inverse.shape
        blocks = self.data_RK.float().view(
            num_down, rows // num_down, num_across, columns // num_across
        )
        return (blocks * self.inverse[:, None, :, None]).view(rows, columns)

    def transposed(self) -> "FP8Matrix":
        """Return [K, R] with the same scales, contiguous."""
        return FP8Matrix(self.data_RK.t().contiguous(), self.inverse.t())


def cast(
    x_RK: torch.Tensor,
    dtype: torch.dtype,
    shared: tuple[int, int],
    groups: Sequence[dist.ProcessGroup] = (),
) -> FP8Matrix:
    """Cast with one scale per block of a matrix.

    Args:
        x_RK: values.
        dtype: E4M3 or E5M2.
        shared: rows and columns that share a scale; they divide R and K.
        groups: groups whose ranks hold other parts that share a scale.

    Collectives: one all-reduce (max) of the largest magnitudes per group, 4 bytes a scale.
    """
    rows, columns = shared
    num_down, num_across = x_RK.shape[0] // rows, x_RK.shape[1] // columns
    blocks = x_RK.float().reshape(num_down, rows, num_across, columns)
    amax = blocks.abs().amax(dim=(1, 3))
    for group in groups:
        dist.all_reduce(amax, dist.ReduceOp.MAX, group=group)
    scale = scale_of(amax, dtype)
    scaled = blocks * scale[:, None, :, None]
    # The reciprocal of a power of two is exact.
    return FP8Matrix(saturated(scaled, dtype).view(x_RK.shape), 1 / scale)


def cast_whole(
    x_RK: torch.Tensor,
    dtype: torch.dtype,
    groups: Sequence[dist.ProcessGroup] = (),
    implementation: str = "torch",
) -> tuple[FP8Matrix, FP8Matrix]:
    """Cast with one scale: [R, K], and its transpose [K, R], reading the values once.

    Args:
        x_RK: values.
        dtype: E4M3 or E5M2.
        groups: groups whose ranks hold other parts of the matrix.
        implementation: implementation of the op fp8_cast.

    Collectives: one all-reduce (max) of 4 bytes per group.
    """
    amax = x_RK.abs().amax().float()
    for group in groups:
        dist.all_reduce(amax, dist.ReduceOp.MAX, group=group)
    scale = scale_of(amax, dtype)
    both = cast_tensor(
        x_RK.contiguous(), scale, dtype=dtype, columnwise=True, implementation=implementation
    )
    assert both.columnwise is not None, "asked for above"
    inverse = (1 / scale).view(1, 1)
    return FP8Matrix(both.rowwise, inverse), FP8Matrix(both.columnwise, inverse)


def gathered_rows(
    matrix: FP8Matrix, group: dist.ProcessGroup, *, have_own_scales: bool
) -> FP8Matrix:
    """Return the rows of all ranks, in rank order.

    Args:
        matrix: this rank's rows.
        group: group that splits the rows.
        have_own_scales: whether each rank's rows have their own scales; otherwise all ranks have
            the same ones.

    Collectives: one all-gather of 1 byte a number; one of the scales, where ranks have their own.
    """
    data_RK = _gathered(matrix.data_RK.view(torch.uint8), group).view(matrix.data_RK.dtype)
    inverse = _gathered(matrix.inverse, group) if have_own_scales else matrix.inverse
    return FP8Matrix(data_RK, inverse)


def gathered_columns(
    matrix: FP8Matrix, group: dist.ProcessGroup, *, have_own_scales: bool
) -> FP8Matrix:
    """Return the columns of all ranks; as `gathered_rows`."""
    rows = gathered_rows(matrix.transposed(), group, have_own_scales=have_own_scales)
    return rows.transposed()


def _gathered(part: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    whole = part.new_empty((part.shape[0] * group.size(), *part.shape[1:]))
    dist.all_gather_into_tensor(whole, part.contiguous(), group=group)
    return whole
