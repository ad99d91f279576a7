"""The definition of rotary position embedding on packed QKV.

The first rotary_dim elements of each query and key head are halves (a, b) that become
(a cos - b sin, b cos + a sin) with the token's angles; values pass through. A position without
angles, outside of the tables, gives NaN. Half precision is computed in fp32 and rounded once.
"""

import torch
from torch import Tensor

from phi4_kernels.reference_arithmetic import widened
from phi4_kernels.rope.layout import QKVLayout


def positions(
    num_tokens: int, position_ids: Tensor | None, cu_seqlens: Tensor | None, device: torch.device
) -> Tensor:
    """[T] positions: as given, or counted from each document's start, or from 0."""
    if position_ids is not None:
        return position_ids
    tokens = torch.arange(num_tokens, device=device)
    if cu_seqlens is None:
        return tokens
    starts = cu_seqlens[:-1].to(tokens.dtype)
    # The last document that starts at or before the token; empty ones hold none.
    index = torch.searchsorted(starts, tokens, right=True) - 1
    return tokens - starts[index.clamp(min=0)]


def angles(table: Tensor, at: Tensor) -> Tensor:
    """Rows of a table [P, rotary_dim / 2] at positions [T]; NaN at a position outside of it."""
    foreign = (at < 0) | (at >= table.shape[0])
    return table[at.clamp(0, table.shape[0] - 1)].masked_fill_(foreign.unsqueeze(-1), torch.nan)


def rotated(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate heads [T, ..., D] by angles [T, rotary_dim / 2]."""
    half = cos.shape[-1]
    shape = (cos.shape[0],) + (1,) * (heads.dim() - 2) + (half,)
    cos, sin = cos.view(shape), sin.view(shape)
    # a' = a cos t - b sin t, b' = b cos t + a sin t; a and b are the halves, not neighbours
    a, b, rest = widened(heads).split((half, half, heads.shape[-1] - 2 * half), dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin, rest), dim=-1).to(heads.dtype)


def rope_qkv(
    qkv: Tensor,
    layout: QKVLayout,
    cos: Tensor,
    sin: Tensor,
    *,
    position_ids: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """[T, width] -> q [T, G, Q, D], k [T, G, D], v [T, G, D]; qkv is left as it is."""
    at = positions(qkv.shape[0], position_ids, cu_seqlens, qkv.device)
    q, k, v = layout.split(qkv)
    cos, sin = angles(cos, at), angles(sin, at)
    return rotated(q, cos, sin), rotated(k, cos, sin), v
