"""The product of two FP8 matrices, on tensor cores and on a CPU."""

import torch

from phi4.engine.model.fp8.casts import FP8Matrix

# Shape legend: M, N rows of the factors, K columns of both.


def product(
    a_MK: FP8Matrix, b_NK: FP8Matrix, dtype: torch.dtype, *, is_exact: bool
) -> torch.Tensor:
    """Return a @ b.T, summed in fp32: [M, N].

    Scales of matrices and rows use torch's own FP8 product. Blockwise scales have no product on a
    CPU: there the dequantised values are multiplied, which is the definition.

    Args:
        a_MK, b_NK: factors; K is a multiple of 16, N as well.
        dtype: dtype of the result. A GPU supports fp32 only for scales of entire matrices.
        is_exact: sum all of K in fp32 on a GPU, whose tensor cores are faster with 14 bits.
    """
    kind = _kind(a_MK, b_NK)
    if kind == "blocks":
        return (a_MK.values() @ b_NK.values().t()).to(dtype)
    scale_a, scale_b = a_MK.inverse, b_NK.inverse.t()
    if kind == "matrix":
        scale_a, scale_b = scale_a.reshape(()), scale_b.reshape(())
    return torch._scaled_mm(
        a_MK.data_RK,
        b_NK.data_RK.t(),
        scale_a=scale_a.contiguous(),
        scale_b=scale_b.contiguous(),
        out_dtype=dtype,
        use_fast_accum=not is_exact,
    )


def _kind(a_MK: FP8Matrix, b_NK: FP8Matrix) -> str:
    if a_MK.inverse.numel() == b_NK.inverse.numel() == 1:
        return "matrix"
    is_rows = all(one.inverse.shape == (one.data_RK.shape[0], 1) for one in (a_MK, b_NK))
    return "rows" if is_rows else "blocks"
