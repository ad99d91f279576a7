"""The definition of SwiGLU: silu(gate) * up, with [gate | up] the halves of the last dimension.

Half precision is computed in fp32 and rounded once, at the end; fp32 and fp64 stay as they are.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from phi4_kernels.reference_arithmetic import largest, quantized, widened


def _product(gate_up: Tensor) -> Tensor:
    gate, up = widened(gate_up).chunk(2, dim=-1)
    return F.silu(gate) * up


def swiglu(gate_up: Tensor) -> Tensor:
    """[..., 2F] -> [..., F] in the dtype of gate_up."""
    return _product(gate_up).to(gate_up.dtype)


def swiglu_linear(gate_up: Tensor, weight: Tensor) -> Tensor:
    """[T, 2F], [H, F] -> [T, H]: the down projection of the product."""
    return swiglu(gate_up) @ weight.t()


def swiglu_fp8(gate_up: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """[T, 2F] -> e4m3 [T, F] and its amax before scaling []."""
    product = _product(gate_up)
    return quantized(product, scale), largest(product)


def swiglu_backward(dout: Tensor, gate_up: Tensor) -> tuple[Tensor, Tensor]:
    """[T, F], [T, 2F] -> the gradient of gate_up [T, 2F], and the product again [T, F]."""
    gate, up = widened(gate_up).chunk(2, dim=-1)
    sigmoid = torch.sigmoid(gate)
    dproduct = widened(dout)
    # dg = dout * u * s * (1 + g * (1 - s)), s = sigmoid(g)
    dgate = dproduct * up * sigmoid * (1 + gate * (1 - sigmoid))
    # du = dout * silu(g) = dout * g * s
    gradient = torch.cat((dgate, dproduct * gate * sigmoid), dim=-1)
    return gradient.to(gate_up.dtype), swiglu(gate_up)
