"""Sum of squares of many gradients, and the clip factor that follows from it.

The result is the sum of squares in fp64, because ranks add theirs before the root is taken. Two
passes sum in an order that depends on sizes only, without atomics, so runs are bit-identical.
Squares outside of fp32's range are not lost.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from phi4_kernels import dispatch
from phi4_kernels.checks import expect_dtype, expect_same_device
from phi4_kernels.errors import ShapeError
from phi4_kernels.grad_norm import cuda_impl, torch_impl


def square_sum(tensors: Sequence[Tensor], *, implementation: str = "auto") -> Tensor:
    """Sum of the squares of all elements.

    Args:
        tensors: one or more, of one dtype (fp32 or bf16), contiguous; some may be empty.
        implementation: see dispatch.choose.

    Returns:
        [], fp64. NaN and infinities propagate to it.

    Raises:
        DtypeError, ShapeError, DeviceError, ImplementationError: see errors.
    """
    if not tensors:
        raise ShapeError("square_sum: got no tensors; expected at least one; skip the call")
    expect_dtype("square_sum", "tensor 0", tensors[0], (torch.float32, torch.bfloat16))
    for index, tensor in enumerate(tensors):
        expect_dtype("square_sum", f"tensor {index}", tensor, (tensors[0].dtype,))
        if not tensor.is_contiguous():
            raise ShapeError(
                f"square_sum: tensor {index} has stride {tensor.stride()}; expected a contiguous "
                "one; pass the flat gradient buffer"
            )
    expect_same_device("square_sum", **{f"tensor {i}": t for i, t in enumerate(tensors)})
    chosen = dispatch.resolve("grad_norm", implementation, tensors[0].device)
    run = cuda_impl.square_sum if chosen == "cuda" else torch_impl.square_sum
    return run(tensors)


def clip_factor(total: Tensor, max_norm: float, eps: float = 0.0) -> Tensor:
    """min(1, max_norm / (norm + eps)), on the device: the `grad_scale` of adamw.

    Args:
        total: [], fp64: the sum of squares, added over ranks.
        max_norm: above 0.
        eps: 1e-6 in torch.nn.utils.clip_grad_norm_ and megatron-core.

    Returns:
        [], fp32. NaN for a norm that is not a number, 0 for an infinite one.

    Raises:
        ShapeError: max_norm is not above 0.
    """
    if not max_norm > 0:
        raise ShapeError(f"clip_factor: max_norm is {max_norm}; expected above 0; skip the call")
    return (max_norm / (total.sqrt() + eps)).clamp(max=1.0).float()
