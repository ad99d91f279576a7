"""Decoding on PyTorch's own kernels: keys are copied out of the cache's blocks first.

On a CPU, sequences of one query are padded to batches, and the query heads of a group become
queries of their key head: one call for many short rows.
"""

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from phi4_kernels.attention.once import once
from phi4_kernels.attention.torch_blocks import Plan, attend, blocks_of, forward_of

# Shape legend: T queries, U keys, P slots, N query heads, K key-value heads, D head dim; B
# sequences of a batch, L keys of each.


def decode(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    q_offsets: Tensor,
    blocks: Tensor,
    lengths: Tensor,
    block_tokens: int,
    max_length: int,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """See decoding.attention_decode; the keys are copied into contiguous memory."""
    where = q_offsets, blocks, lengths
    return decode_plan(q, *where, block_tokens, causal, scale)(q, keys, values)


def decode_plan(
    q: Tensor,
    q_offsets: Tensor,
    blocks: Tensor,
    lengths: Tensor,
    block_tokens: int,
    causal: bool,
    scale: float,
) -> Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]:
    """See decoding.plan_decode."""

    def gather() -> tuple[Tensor, Plan]:
        ends = lengths.cumsum(0)
        plan = blocks_of(q_offsets, ends - lengths, ends, causal)
        return _slots(blocks, lengths, block_tokens), plan

    where = q_offsets, blocks, lengths
    # On a CPU one padded call costs less than a call per sequence.
    if q.device.type == "cpu" and q.shape[0] == lengths.numel():
        settings = ("torch", "decode padded", block_tokens)
        batches = once(where, settings, lambda: _padded(*where, block_tokens))
        if batches:
            return partial(_decode_padded, batches=batches, scale=scale)
    slots, plan = once(where, ("torch", "decode", block_tokens, causal), gather)
    return partial(_decode_gathered, slots=slots, plan=plan, scale=scale)


def _decode_gathered(
    q: Tensor, keys: Tensor, values: Tensor, slots: Tensor, plan: Plan, scale: float
) -> tuple[Tensor, Tensor]:
    return forward_of(q, keys.index_select(0, slots), values.index_select(0, slots), plan, scale)


class _Padded(NamedTuple):
    """Adjacent sequences of one query each, padded to the longest."""

    rows: slice
    slots: Tensor
    """[B * L], int64: slots of the keys, L per sequence."""
    unseen: Tensor | None
    """[B, 1, 1, L], fp32: minus infinity for padding; None without padding."""

    def gathered(self, cache: Tensor) -> Tensor:
        """[P, K, D] to [B, K, L, D]."""
        shape = (self.rows.stop - self.rows.start, -1, *cache.shape[1:])
        return cache.index_select(0, self.slots).view(shape).transpose(1, 2)


def _padded(q_offsets: Tensor, blocks: Tensor, lengths: Tensor, block_tokens: int) -> list[_Padded]:
    """Batches at most twice as large as their keys; none unless every sequence has one query."""
    counts = lengths.tolist()
    if min(counts, default=0) < 1 or q_offsets.tolist() != list(range(len(counts) + 1)):
        return []
    starts, first, longest, total = [0], 0, 0, 0
    for row, count in enumerate(counts):
        longest, total = max(longest, count), total + count
        # sequences * longest > 2 * keys: more than half of the batch would be padding.
        if (row + 1 - first) * longest > 2 * total:
            starts.append(row)
            first, longest, total = row, count, count
    slots = _slots_of_blocks(blocks, block_tokens)
    rows = [slice(*pair) for pair in pairwise((*starts, len(counts)))]
    return [_padded_batch(one, slots[one], counts[one]) for one in rows]


def _padded_batch(rows: slice, slots: Tensor, lengths: list[int]) -> _Padded:
    longest = max(lengths)
    slots = slots[:, :longest]
    if min(lengths) == longest:
        return _Padded(rows, slots.flatten(), None)
    unseen = torch.arange(longest) >= torch.tensor(lengths).unsqueeze(1)
    # Padding repeats the sequence's first key: unused slots of a block may be NaN.
    slots = slots.where(~unseen, slots[:, :1])
    mask = torch.zeros(unseen.shape).masked_fill_(unseen, -torch.inf)[:, None, None]
    return _Padded(rows, slots.flatten(), mask)


def _decode_padded(
    q: Tensor, keys: Tensor, values: Tensor, batches: list[_Padded], scale: float
) -> tuple[Tensor, Tensor]:
    """Decode a batch; the query heads of a group become queries of its key head."""
    num_heads, dim = keys.shape[1:]
    grouped = q if q.dim() == 4 else q.reshape(q.shape[0], num_heads, -1, dim)
    parts = [
        attend(
            grouped[one.rows], one.gathered(keys), one.gathered(values), False, scale, one.unseen
        )
        for one in batches
    ]
    out, lse = parts[0] if len(parts) == 1 else map(torch.cat, zip(*parts, strict=True))
    return out.reshape(q.shape[0], -1, dim).to(q.dtype), lse.reshape(q.shape[0], -1)


def _slots_of_blocks(blocks: Tensor, block_tokens: int) -> Tensor:
    """[n, B * block_tokens], int64."""
    within = torch.arange(block_tokens, device=blocks.device)
    return (blocks.long().unsqueeze(-1) * block_tokens + within).flatten(1)


def _slots(blocks: Tensor, lengths: Tensor, block_tokens: int) -> Tensor:
    """[U], int64: the slots of all keys, one sequence after the other."""
    slots = _slots_of_blocks(blocks, block_tokens)
    # Slots past a sequence's length belong to other sequences or to none.
    return slots[torch.arange(slots.shape[1], device=blocks.device) < lengths.unsqueeze(1)]
