"""RoPE on PyTorch's own kernels, in place like the fused kernel."""

import torch
from torch import Tensor

from phi4_kernels.rope import reference
from phi4_kernels.rope.layout import QKVLayout


def _rotate(source: Tensor, target: Tensor, cos: Tensor, sin: Tensor) -> None:
    half = cos.shape[-1]
    shape = (cos.shape[0],) + (1,) * (source.dim() - 2) + (half,)
    cos, sin = cos.view(shape), sin.view(shape)
    # Both halves are read before either is written: source and target may be one.
    a, b = source[..., :half].float(), source[..., half : 2 * half].float()
    first, second = torch.addcmul(a * cos, b, sin, value=-1), torch.addcmul(b * cos, a, sin)
    target[..., :half].copy_(first)
    target[..., half : 2 * half].copy_(second)


def forward(
    qkv: Tensor,
    layout: QKVLayout,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor | None,
    cu_seqlens: Tensor | None,
) -> None:
    """See op.rope_qkv; overwrites qkv [T, width]."""
    at = reference.positions(qkv.shape[0], position_ids, cu_seqlens, qkv.device)
    cos, sin = reference.angles(cos, at), reference.angles(sin, at)
    q, k, _ = layout.split(qkv)
    _rotate(q, q, cos, sin)
    _rotate(k, k, cos, sin)


def backward(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    layout: QKVLayout,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor | None,
    cu_seqlens: Tensor | None,
) -> Tensor:
    """Gradient of the packed projection [T, width]."""
    at = reference.positions(dq.shape[0], position_ids, cu_seqlens, dq.device)
    # The inverse of a rotation by t is one by -t.
    cos, sin = reference.angles(cos, at), -reference.angles(sin, at)
    packed = dq.new_empty(dq.shape[0], layout.width)
    q, k, v = layout.split(packed)
    rotary_dim = 2 * cos.shape[-1]
    for source, target in ((dq, q), (dk, k)):
        _rotate(source, target, cos, sin)
        target[..., rotary_dim:].copy_(source[..., rotary_dim:])
    v.copy_(dv)
    return packed
