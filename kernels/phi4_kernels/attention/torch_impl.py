"""Attention on PyTorch's own kernels: blocks of `torch_blocks`, merged by their log-sum-exp."""

import torch
from torch import Tensor

from phi4_kernels.attention.torch_blocks import attend_backward, forward_of, plan_of
from phi4_kernels.attention.torch_decode import decode

__all__ = ["backward", "decode", "forward"]

# Shape legend: T queries, U keys, N query heads, K key-value heads, D head dim.


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_offsets: Tensor,
    k_starts: Tensor,
    k_ends: Tensor,
    max_queries: int,
    max_keys: int,
    causal: bool,
    scale: float,
    sm_margin: int,
) -> tuple[Tensor, Tensor]:
    """See op.attention_forward."""
    return forward_of(q, k, v, plan_of(q_offsets, k_starts, k_ends, causal), scale)


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    q_offsets: Tensor,
    k_starts: Tensor,
    k_ends: Tensor,
    max_queries: int,
    max_keys: int,
    causal: bool,
    scale: float,
    sm_margin: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """See op.attention_backward."""
    dq, dk, dv = (torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    for blocks in plan_of(q_offsets, k_starts, k_ends, causal):
        rows = (blocks.queries(x) for x in (dout, q, out, lse))
        dout_b, q_b, out_b, lse_b = rows
        k_b, v_b = blocks.keys(k), blocks.keys(v)
        parts = attend_backward(dout_b, q_b, k_b, v_b, out_b, lse_b, blocks.causal, scale)
        targets = blocks.queries(dq), blocks.keys(dk), blocks.keys(dv)
        if blocks.merges:
            parts = (parts[0] + targets[0], *parts[1:])
        for target, values in zip(targets, parts, strict=True):
            target.copy_(values)
    return dq, dk, dv
