"""SwiGLU on PyTorch's own kernels, with PyTorch's own gradients."""

import torch.nn.functional as F
from torch import Tensor

from phi4_kernels.swiglu import reference


def swiglu(gate_up: Tensor) -> Tensor:
    """See op.swiglu."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def backward(dout: Tensor, gate_up: Tensor, emit_product: bool) -> tuple[Tensor, Tensor]:
    """See op.swiglu_backward."""
    gradient, product = reference.swiglu_backward(dout, gate_up)
    return gradient, product if emit_product else product.new_empty((0, 0))


def forward_fp8(gate_up: Tensor, scale: Tensor, columnwise: bool) -> tuple[Tensor, Tensor, Tensor]:
    """See op.swiglu_fp8."""
    rowwise, amax = reference.swiglu_fp8(gate_up, scale)
    return rowwise, rowwise.t().contiguous() if columnwise else rowwise, amax
