"""The definition of attention over ranges, and of its gradient, one range after the other.

Probabilities and score gradients are rounded to the inputs' dtype before their second product, as
the operands of any half-precision product are; everything else is fp32, or fp64 for fp64.
Source: Dao 2023 (FlashAttention-2), algorithms 1 and 2, without tiles.
"""

from collections.abc import Iterator
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from phi4_kernels.attention.block_table import BlockTable
from phi4_kernels.attention.ranges import Ranges
from phi4_kernels.reference_arithmetic import widened

# Shape legend: T queries, U keys, N query heads, K key-value heads, G = N / K, D head dim; M
# queries and L keys of one range.


class _Range(NamedTuple):
    queries: slice
    keys: slice
    visible_ML: Tensor


def _ranges(ranges: Ranges, causal: bool) -> Iterator[_Range]:
    offsets = ranges.q_offsets.tolist()
    keys = zip(ranges.k_starts.tolist(), ranges.k_ends.tolist(), strict=True)
    for start, end, (k_start, k_end) in zip(offsets, offsets[1:], keys, strict=False):
        shape = (end - start, k_end - k_start)
        visible = torch.ones(shape, dtype=torch.bool, device=ranges.q_offsets.device)
        if causal:
            # The ends of both sides meet: the last of M queries sees all L keys.
            visible = visible.tril(shape[1] - shape[0])
        yield _Range(slice(start, end), slice(k_start, k_end), visible)


def _by_group(x_MND: Tensor, num_groups: int) -> Tensor:
    """[M, N, D] as [K, G, M, D], wide."""
    return widened(x_MND).unflatten(1, (num_groups, -1)).permute(1, 2, 0, 3)


def _by_token(x_KGMD: Tensor, dtype: torch.dtype) -> Tensor:
    """[K, G, M, D] as [M, N, D], rounded."""
    return x_KGMD.permute(2, 0, 1, 3).flatten(1, 2).to(dtype)


def _keys(x_UKD: Tensor, part: _Range) -> Tensor:
    """[K, 1, L, D], wide."""
    return widened(x_UKD[part.keys]).transpose(0, 1).unsqueeze(1)


def _operand(x: Tensor, dtype: torch.dtype) -> Tensor:
    return widened(x.to(dtype))


def _scores(q: Tensor, k: Tensor, part: _Range, scale: float) -> Tensor:
    """[K, G, M, L], -inf where a query must not see a key."""
    # s = q k^T * scale
    scores = _by_group(q[part.queries], k.shape[1]) @ _keys(k, part).mT * scale
    return scores.masked_fill(~part.visible_ML, -torch.inf)


def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, ranges: Ranges, *, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """(out [T, N, D], lse [T, N]); see op.attention_forward."""
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    lse = torch.full(q.shape[:2], -torch.inf, dtype=widened(q[:0]).dtype, device=q.device)
    for part in _ranges(ranges, causal):
        scores_KGML = _scores(q, k, part, scale)
        # lse = log sum_j exp(s_j), p = exp(s - lse), out = p v
        lse_KGM1 = torch.logsumexp(scores_KGML, -1, keepdim=True)
        probabilities = torch.where(part.visible_ML, (scores_KGML - lse_KGM1).exp(), 0.0)
        # Kernels multiply p and ds in the dtype of q; so does the definition, with wide sums.
        sums = _operand(probabilities, q.dtype) @ _keys(v, part)
        out[part.queries] = _by_token(sums, q.dtype)
        lse[part.queries] = _by_token(lse_KGM1, lse.dtype).squeeze(-1)
    return out, lse


def attention_decode(
    q: Tensor, keys: Tensor, values: Tensor, table: BlockTable, *, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """(out [T, N, D], lse [T, N]); see decoding.attention_decode."""
    lengths, slots = table.lengths.tolist(), []
    for length, blocks in zip(lengths, table.blocks.tolist(), strict=True):
        tokens = range(length)
        size = table.block_tokens
        # Token t of a sequence is slot t % size of its block number t // size.
        slots += [blocks[token // size] * size + token % size for token in tokens]
    ends = list(accumulate(lengths, initial=0))
    ranges = Ranges.of(table.q_offsets.tolist(), ends[:-1], ends[1:], q.device)
    k, v = keys[slots], values[slots]
    return attention_forward(q, k, v, ranges, causal=causal, scale=scale)


def attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    ranges: Ranges,
    *,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv); see op.attention_backward."""
    dq, dk, dv = (torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    num_groups = k.shape[1]
    for part in _ranges(ranges, causal):
        rows = part.queries
        q_KGMD, dout_KGMD, out_KGMD = (_by_group(x[rows], num_groups) for x in (q, dout, out))
        lse_KGM1 = _by_group(lse[rows].unsqueeze(-1), num_groups)
        # A query without keys has an lse of -inf, which must not be subtracted from a score.
        shifted = torch.where(part.visible_ML, _scores(q, k, part, scale) - lse_KGM1, -torch.inf)
        probabilities = shifted.exp()
        # delta = sum_d dout_d * out_d = sum_j p_j dp_j
        delta = (dout_KGMD * out_KGMD).sum(-1, keepdim=True)
        # ds = p * (dp - delta) * scale, dp = dout v^T
        dscores = probabilities * (dout_KGMD @ _keys(v, part).mT - delta) * scale
        dscores, probabilities = (_operand(x, q.dtype) for x in (dscores, probabilities))
        # dq = ds k; dk = ds^T q and dv = p^T dout, summed over the heads of a group
        dq[rows] = _by_token(dscores @ _keys(k, part), q.dtype)
        dk[part.keys] = (dscores.mT @ q_KGMD).sum(1).transpose(0, 1).to(k.dtype)
        dv[part.keys] = (probabilities.mT @ dout_KGMD).sum(1).transpose(0, 1).to(v.dtype)
    return dq, dk, dv


class _ReferenceAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, ranges: Ranges, causal: bool, scale: float
    ) -> Tensor:
        out, lse = attention_forward(q, k, v, ranges, causal=causal, scale=scale)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.constants = ranges, causal, scale
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        ranges, causal, scale = ctx.constants
        q, k, v, out, lse = ctx.saved_tensors
        gradients = attention_backward(dout, q, k, v, out, lse, ranges, causal=causal, scale=scale)
        return *gradients, None, None, None


def attention(
    q: Tensor, k: Tensor, v: Tensor, ranges: Ranges, *, causal: bool, scale: float
) -> Tensor:
    """out [T, N, D], with the gradient of attention_backward."""
    return _ReferenceAttention.apply(q, k, v, ranges, causal, scale)
