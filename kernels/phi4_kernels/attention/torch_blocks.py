"""Splits attention into blocks that PyTorch's kernels can compute, and computes one block.

A range is a rectangle of keys that all queries see and a square that they see causally. Adjacent
blocks of one shape are one batched call, so rows that hold one document each cost as much as
without ranges. Boundaries are read on the host: on a GPU that waits for the device.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from phi4_kernels.attention.once import once

# Shape legend: T queries, U keys, N query heads, K key-value heads, D head dim; B blocks of one
# shape, M queries and L keys of a block.


class _Blocks(NamedTuple):
    """`num_blocks` adjacent blocks of one shape."""

    q_start: int
    k_start: int
    num_queries: int
    num_keys: int
    causal: bool
    """The block is a square on the diagonal; else every query sees every key."""
    merges: bool = False
    """An earlier block has written its part of the same queries' result."""
    num_blocks: int = 1

    def continues(self, other: "_Blocks") -> bool:
        """Whether this block directly follows those of `other` and has their shape."""
        after = other.q_start + other.num_blocks * other.num_queries
        after_k = other.k_start + other.num_blocks * other.num_keys
        return (after, after_k, *other[2:6]) == self[:6]

    def queries(self, x: Tensor) -> Tensor:
        """View of these queries of [T, heads, ...] as [B, heads, M, ...]."""
        return _cut(x, self.q_start, self.num_blocks, self.num_queries)

    def keys(self, x: Tensor) -> Tensor:
        """View of these keys of [U, heads, ...] as [B, heads, L, ...]."""
        return _cut(x, self.k_start, self.num_blocks, self.num_keys)


def _cut(x: Tensor, start: int, count: int, length: int) -> Tensor:
    """x[start : start + count * length] as [count, heads, length, ...], in one call."""
    token, head, *rest = x.stride()
    shape, strides = (count, x.shape[1], length, *x.shape[2:]), (length * token, head, token, *rest)
    return x.as_strided(shape, strides, x.storage_offset() + start * token)


def _blocks_of_range(
    q_start: int, q_end: int, k_start: int, k_end: int, causal: bool
) -> list[_Blocks]:
    num_queries, num_keys = q_end - q_start, k_end - k_start
    # A single query sees all of its range.
    if not causal or num_queries == 1:
        blocks = [_Blocks(q_start, k_start, num_queries, num_keys, False)]
    else:
        # The queries that see any key, and the keys that all of these queries see.
        side = min(num_queries, num_keys)
        before = num_keys - side
        blocks = [
            _Blocks(q_end - side, k_start, side, before, False),
            _Blocks(q_end - side, k_end - side, side, side, True, merges=before > 0),
        ]
    return [block for block in blocks if block.num_queries and block.num_keys]


Plan = list[_Blocks]


def plan_of(q_offsets: Tensor, k_starts: Tensor, k_ends: Tensor, causal: bool) -> Plan:
    """The blocks of all ranges, adjacent ones of one shape together; made once."""
    where = q_offsets, k_starts, k_ends
    return once(where, ("torch", causal), lambda: blocks_of(*where, causal))


def blocks_of(q_offsets: Tensor, k_starts: Tensor, k_ends: Tensor, causal: bool) -> Plan:
    queries = pairwise(q_offsets.tolist())
    keys = zip(k_starts.tolist(), k_ends.tolist(), strict=True)
    plan: Plan = []
    for of_queries, of_keys in zip(queries, keys, strict=True):
        for block in _blocks_of_range(*of_queries, *of_keys, causal):
            if plan and block.continues(plan[-1]):
                plan[-1] = plan[-1]._replace(num_blocks=plan[-1].num_blocks + 1)
            else:
                plan.append(block)
    return plan


_aten = torch.ops.aten
# Elements of a score matrix that the plain form holds at a time.
_SCORES = 1 << 28


@contextmanager
def _deterministic() -> Iterator[None]:
    """PyTorch's flash backward uses atomics unless deterministic algorithms are enabled."""
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)


def _is_flash(q: Tensor) -> bool:
    return q.device.type == "cuda" and q.dtype in (torch.bfloat16, torch.float16)


def attend(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float, added: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """q [B, N, M, D], k and v [B, K, L, D] to out [B, N, M, D] and lse [B, N, M], fp32.

    On a CPU `added`, broadcast to [B, N, M, L] and fp32, is added to the scores.
    """
    if q.device.type == "cpu":
        # In half precision it uses a coarse exp: its lse has errors of 1e-5.
        wide = tuple(x.float() for x in (q, k, v))
        run = _aten._scaled_dot_product_flash_attention_for_cpu
        out, lse = run(*wide, 0.0, causal, attn_mask=added, scale=scale)
        # It hides a NaN in q: such a query gets a finite result.
        if not math.isfinite(wide[0].sum()):
            marks = wide[0].mul(0.0).sum(-1)
            out, lse = out.add_(marks.unsqueeze(-1)), lse.add_(marks)
        return out, lse
    if _is_flash(q):
        return _aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, scale=scale)[:2]
    out, lse = torch.empty_like(q), torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    for rows, scores in _plain_scores(q, k, causal, scale):
        part = torch.logsumexp(scores, -1)
        # p = exp(s - lse), in the memory of s
        weights = scores.sub_(part.unsqueeze(-1)).exp_()
        out[:, :, rows] = (weights @ v.unsqueeze(2)).flatten(1, 2)
        lse[:, :, rows] = part.flatten(1, 2)
    return out, lse


def attend_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, given out and lse over these keys and perhaps more."""
    # PyTorch's CUDA kernel takes lse by its pointer alone, as dense [B, N, M]; a view of [T, N] is
    # not, and gave dq errors of 30. It makes dout and out dense itself, and reads q, k, v strided.
    tensors = (dout, q, k, v, out, lse.contiguous())
    if q.device.type == "cpu":
        # In fp16 it is 8 times slower than in fp32.
        wide = (x.float() if x.dtype == torch.float16 else x for x in tensors)
        run = _aten._scaled_dot_product_flash_attention_for_cpu_backward
        return run(*wide, 0.0, causal, scale=scale)
    if _is_flash(q):
        # Without dropout the random state is not read, and dense blocks have no boundaries.
        lengths, state = (
            (q.shape[2], k.shape[2]),
            torch.empty(2, dtype=torch.uint64, device=q.device),
        )
        rest = (None, None, *lengths, 0.0, causal, state, state[:0])
        with _deterministic():
            return _aten._scaled_dot_product_flash_attention_backward(*tensors, *rest, scale=scale)
    return _plain_backward(*tensors, causal, scale)


def _plain_scores(
    q: Tensor, k: Tensor, causal: bool, scale: float
) -> Iterator[tuple[slice, Tensor]]:
    """Scores [B, K, N / K, rows, L] of some queries at a time."""
    (batch, num_heads, num_queries, _), num_keys = q.shape, k.shape[2]
    # As many queries as fit the limit, at least one: s of all of them may not fit in memory.
    step = max(1, _SCORES // (batch * num_heads * num_keys))
    for start in range(0, num_queries, step):
        rows = slice(start, min(start + step, num_queries))
        scores = q[:, :, rows].unflatten(1, (k.shape[1], -1)) @ k.unsqueeze(2).mT
        scores.mul_(scale)
        if causal:
            columns = torch.arange(num_keys, device=q.device)
            unseen = columns > torch.arange(rows.start, rows.stop, device=q.device).unsqueeze(-1)
            scores.masked_fill_(unseen, -torch.inf)
        yield rows, scores


def _plain_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    groups = (k.shape[1], -1)
    dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    # delta = sum_d dout_d * out_d
    delta = (dout * out).sum(-1, keepdim=True)
    for rows, scores in _plain_scores(q, k, causal, scale):
        dout_rows, delta_rows, q_rows, lse_rows = (
            x[:, :, rows].unflatten(1, groups) for x in (dout, delta, q, lse.unsqueeze(-1))
        )
        # p = exp(s - lse), dv += p^T dout
        weights = scores.sub_(lse_rows).exp_()
        dv += (weights.mT @ dout_rows).sum(2)
        # ds = p * (dp - delta) * scale, dq = ds k, dk += ds^T q
        dscores = (dout_rows @ v.unsqueeze(2).mT).sub_(delta_rows).mul_(weights).mul_(scale)
        dq[:, :, rows] = (dscores @ k.unsqueeze(2)).flatten(1, 2)
        dk += (dscores.mT @ q_rows).sum(2)
    return dq, dk, dv


def _merged(out: Tensor, lse: Tensor, more: Tensor, more_lse: Tensor) -> tuple[Tensor, Tensor]:
    # lse = log(exp(lse1) + exp(lse2)); each part weighs exp(lse_i - lse).
    total = torch.logaddexp(lse, more_lse)
    first, second = ((part - total).exp().unsqueeze(-1) for part in (lse, more_lse))
    return (out * first + more * second).to(out.dtype), total


def forward_of(q: Tensor, k: Tensor, v: Tensor, plan: Plan, scale: float) -> tuple[Tensor, Tensor]:
    out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.full(q.shape[:2], -torch.inf, dtype=torch.float32, device=q.device)
    for blocks in plan:
        part = attend(blocks.queries(q), blocks.keys(k), blocks.keys(v), blocks.causal, scale)
        here = blocks.queries(out), blocks.queries(lse)
        for target, values in zip(
            here, _merged(*here, *part) if blocks.merges else part, strict=True
        ):
            target.copy_(values)
    return out, lse
