"""Checks of attention's Triton kernels that run inside the interpreting process."""

from dataclasses import replace
from itertools import pairwise
from typing import Any
from unittest import mock

import torch
from phi4_kernels import interpreter
from phi4_kernels.attention import (
    BlockTable,
    Ranges,
    attention,
    attention_backward,
    attention_decode,
    attention_forward,
    reference,
)
from torch import Tensor

from tests.support.gradient_passes import Passes

_SIDES = ("offsets", "starts", "ends")


def _ranges(offsets: list[int], starts: list[int], ends: list[int], longest: int) -> Ranges:
    found = Ranges.of(offsets, starts, ends)
    return Ranges(found.q_offsets, found.k_starts, found.k_ends, longest, longest)


def _visible(ranges: Ranges, num_queries: int, num_keys: int, causal: bool) -> Tensor:
    """[T, U]: the definition's masks, in place."""
    visible = torch.zeros(num_queries, num_keys, dtype=torch.bool)
    for part in reference._ranges(ranges, causal):
        visible[part.queries, part.keys] = part.visible_ML
    return visible


def tiles_partition_and_bound(
    where: list[list[int]], sizes: list[int], rows: int, causal: bool, of_keys: bool
) -> int:
    """Tiles cover every token once, long ranges begin tiles, bounds are the definition's mask.

    Returns:
        How many tiles there are.
    """
    ranges = _ranges(*where, longest=0)
    by_query, by_key = (
        (ranges.q_offsets[:-1], ranges.q_offsets[1:]),
        (ranges.k_starts, ranges.k_ends),
    )
    own, other = (by_key, by_query) if of_keys else (by_query, by_key)
    # Triton decides at its import whether it interprets.
    from phi4_kernels.attention.triton_tiles import cut

    tiles = cut(sizes[of_keys], own, other, rows, causal, of_keys)
    count = int(tiles.starts[0])
    edges = tiles.starts[1 : count + 2].tolist()
    assert edges[0] == 0 and edges[-1] == sizes[of_keys] and count <= tiles.limit
    assert all(0 < end - start <= rows for start, end in pairwise(edges))
    for start, end in zip(*(side.tolist() for side in own), strict=True):
        if end - start >= rows:
            assert set(range(start, end, rows)) <= set(edges)
    visible = _visible(ranges, *sizes, causal)
    visible = visible.T if of_keys else visible
    at = torch.arange(visible.shape[1])
    assert torch.equal(visible, (at >= tiles.lows.unsqueeze(1)) & (at < tiles.highs.unsqueeze(1)))
    return count


def _inputs(sizes: list[int], heads: list[int], dim: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(sum(sizes))
    shapes = (
        (sizes[0], heads[0]),
        (sizes[1], heads[1]),
        (sizes[1], heads[1]),
        (sizes[0], heads[0]),
    )
    return tuple(torch.randn(*shape, dim, generator=generator) for shape in shapes)


def _run(
    inputs: tuple[Tensor, ...], ranges: Ranges, implementation: str = "triton", **options: Any
) -> tuple[Tensor, ...]:
    *leaves, dout = (x.detach().clone().requires_grad_() for x in inputs)
    out, lse = attention(*leaves, ranges, implementation=implementation, **options)
    return out.detach(), lse, *torch.autograd.grad(out, leaves, dout)


def equals_the_definition(
    where: list[list[int]], sizes: list[int], heads: list[int], causal: bool
) -> None:
    """Results and gradients in fp32, tiny ranges and queries of few keys included."""
    ranges, inputs = _ranges(*where, longest=8), _inputs(sizes, heads, 64)
    ours = _run(inputs, ranges, causal=causal)
    q, k, v, dout = (x.double() for x in inputs)
    options = {"causal": causal, "scale": 64**-0.5}
    out, lse = reference.attention_forward(q, k, v, ranges, **options)
    truth = reference.attention_backward(dout, q, k, v, out, lse, ranges, **options)
    slots = [range(*pair) for pair in zip(*where[1:], strict=True)]
    lengths, queries = [len(row) for row in slots], [b - a for a, b in pairwise(where[0])]
    table = BlockTable.of(slots, lengths, 1, queries)
    table = BlockTable(ranges.q_offsets, table.blocks, table.lengths, 1, table.max_length)
    ours += attention_decode(*inputs[:3], table, causal=causal, implementation="triton")
    wanted = (out, lse, *truth, out, lse)
    for mine, exact in zip(ours, wanted, strict=True):
        torch.testing.assert_close(mine.double(), exact, rtol=1e-5, atol=2e-5)


def _cache(num_blocks: int, seed: int) -> tuple[Tensor, Tensor]:
    """Keys and values of blocks of 16 slots, and one key head."""
    generator = torch.Generator().manual_seed(seed)
    shape = (num_blocks * 16, 1, 64)
    return tuple(torch.randn(shape, generator=generator).bfloat16() for _ in range(2))


def decoding_does_not_depend_on_the_batch() -> None:
    """A sequence alone, its blocks elsewhere, gives the bits that it gives beside one of more
    parts, and a `max_length` that is too small costs time, not keys."""
    named = {"implementation": "triton"}
    q, *_ = (x.bfloat16() for x in _inputs([4, 1], [1, 1], 64))
    cache, order = _cache(60, 0), torch.randperm(60, generator=torch.Generator().manual_seed(1))
    others, mine = order[:41].tolist(), order[41:].tolist()
    table = BlockTable.of([others[:1], mine, others[1:]], [1, 290, 520], 16, [1, 2, 1])
    batch = attention_decode(q, *cache, table, **named)
    own = [x.unflatten(0, (-1, 16))[mine].flatten(0, 1) for x in cache]
    alone = BlockTable.of([range(19)], [290], 16, [2])
    single = attention_decode(q[1:3], *own, alone, **named)
    for among, one in zip(batch, single, strict=True):
        assert torch.equal(among[1:3], one)
    short = BlockTable(alone.q_offsets, alone.blocks, alone.lengths, 16, 1)
    found = attention_decode(q[1:3], *own, short, **named)
    for ours, wanted in zip(found, single, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-2, atol=1e-3)


def a_key_that_is_not_finite_reaches_only_queries_that_see_it() -> None:
    """Of two queries the first does not see the last key, whatever that holds."""
    q, *_ = (x.bfloat16() for x in _inputs([2, 1], [2, 1], 64))
    keys, values = _cache(3, 0)
    table = BlockTable.of([[2, 0, 1]], [40], 16, [2])
    before, _ = attention_decode(q, keys, values, table, implementation="triton")
    for tensor in (keys, values):
        spoiled = tensor.clone()
        spoiled[16 + 7, :, 3] = torch.nan
        parts = (spoiled, values) if tensor is keys else (keys, spoiled)
        after, _ = attention_decode(q, *parts, table, implementation="triton")
        assert torch.equal(after[0], before[0]) and not after[1].isfinite().all()


def long_documents_never_meet(dtype: str) -> None:
    """NaN in the middle document reaches nobody else: its tiles are not even loaded."""
    lengths = [70, 90, 64]
    offsets = [0, 70, 160, 224]
    ranges = _ranges(offsets, offsets[:-1], offsets[1:], max(lengths))
    inputs = tuple(x.to(getattr(torch, dtype)) for x in _inputs([224, 224], [1, 1], 64))
    before = _run(inputs, ranges)
    for tensor in inputs:
        tensor[70:160] = torch.nan
    after = _run(inputs, ranges)
    kept = torch.cat((torch.arange(70), torch.arange(160, 224)))
    for first, second in zip(before, after, strict=True):
        assert torch.equal(first[kept], second[kept])
    assert after[0][70:160].isnan().all()


def what_is_not_finite_stays_in_its_document(implementation: str) -> None:
    """NaN or infinity in one token of a short document; its neighbours share a tile with it."""
    offsets, token = [0, 5, 14, 18], 7
    ranges = _ranges(offsets, offsets[:-1], offsets[1:], 9)
    inputs = tuple(x.bfloat16() for x in _inputs([18, 18], [2, 1], 64))
    before = _run(inputs, ranges, implementation)
    kept = torch.cat((torch.arange(5), torch.arange(14, 18)))
    for index, value in (
        (0, torch.nan),
        (1, torch.nan),
        (2, torch.nan),
        (2, torch.inf),
        (3, torch.nan),
    ):
        spoiled = [x.clone() for x in inputs]
        spoiled[index][token, :, 3] = value
        after = _run(tuple(spoiled), ranges, implementation)
        for first, second in zip(before, after, strict=True):
            assert torch.equal(first[kept], second[kept])
        out, _, dq, dk, _ = (x[5:14].isfinite().all() for x in after)
        assert not dq and not dk and (index == 3 or not out)


def far_rows_are_addressed_in_64_bits() -> None:
    """The last rows of q, k and v start past element 2^31; the pages between are never touched."""
    tokens, stride = 140, 2**24 - 64
    far = torch.empty(tokens * stride, dtype=torch.bfloat16)
    near = torch.randn(tokens, 3, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    view = far.as_strided((tokens, 3, 64), (stride, 64, 1)).copy_(near)
    ranges = _ranges([0, 2, tokens], [0, 2], [2, tokens], tokens)
    near_parts, far_parts = (x.split(1, dim=1) for x in (near, view))
    dout = torch.ones(tokens, 1, 64).bfloat16()
    leaves = [x.detach().requires_grad_() for x in far_parts]
    out, lse = attention(*leaves, ranges, implementation="triton")
    ours = (out.detach(), lse, *torch.autograd.grad(out, leaves, dout))
    for first, second in zip(ours, _run((*near_parts, dout), ranges), strict=True):
        assert torch.equal(first, second)


def queries_are_read_by_group() -> None:
    """q as views into packed QKV, [T, K, N / K, D], gives the bits of a q that is copied out, and
    nothing but the kernels reads it."""
    num_groups, group = 2, 2
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(9, num_groups, group + 2, 64, generator=generator)
    ranges = _ranges([0, 4, 9], [0, 4], [4, 9], 8)

    def run(flat: bool) -> list[Tensor]:
        leaf = qkv.clone().requires_grad_()
        q, k, v = leaf[:, :, :group], leaf[:, :, group], leaf[:, :, group + 1]
        q = q.flatten(1, 2) if flat else q
        with Passes([leaf]) as passes:
            out = attention(q, k, v, ranges, implementation="triton").out
            gradient = torch.autograd.grad(out.cos().sum(), leaf)
        assert flat or set(passes.reads) == {"phi4::attention_forward", "phi4::attention_backward"}
        return [out.detach(), *gradient]

    for first, second in zip(run(flat=True), run(flat=False), strict=True):
        assert torch.equal(first, second)
    q, k, v = qkv[:, :, :group], qkv[:, :, group], qkv[:, :, group + 1]
    table = BlockTable.of([[0], [1]], [4, 4], 4, [4, 5])
    decoded = (
        attention_decode(shaped, k, v, table, implementation="triton")
        for shaped in (q, q.flatten(1, 2))
    )
    for first, second in zip(*decoded, strict=True):
        assert torch.equal(first, second)


def parts_of_a_long_row(**sizes: int) -> int:
    """Parts of a group's heads where a range is long, in half precision."""
    from phi4_kernels.attention import triton_dkdv, triton_impl

    return triton_dkdv.num_parts(triton_impl.DKDV["half"][-1], **sizes)


def parts_give_what_the_whole_gives() -> None:
    """dk and dv of a group of 4 in 1, 2 and 4 parts, which are added in any order of programs."""
    from phi4_kernels.attention import triton_impl

    *inputs, dout = (x.bfloat16() for x in _inputs([40, 40], [8, 2], 64))
    offsets, row = [0, 7, 40], triton_impl.DKDV["half"][-1]
    ranges = _ranges(offsets, offsets[:-1], offsets[1:], row.limit)
    named, found = {"implementation": "triton"}, []
    given = (dout, *inputs, *attention_forward(*inputs, ranges, **named), ranges)
    for parts in (1, 2, 4):
        ladder = {"half": (replace(row, most_programs=parts * 2),)}
        with mock.patch.object(triton_impl, "DKDV", ladder):
            found.append(attention_backward(*given, **named)[1:])
            with interpreter.program_order("shuffled"):
                again = attention_backward(*given, **named)[1:]
        assert all(map(torch.equal, found[-1], again))
    for parted in found[1:]:
        for mine, whole in zip(parted, found[0], strict=True):
            # bf16 has 8 bits: neighbours differ by 2**-7 at most, and sums near 0 by their terms'.
            torch.testing.assert_close(mine.float(), whole.float(), rtol=2**-7, atol=2**-8)


def one_graph_holds_attention(implementation: str) -> None:
    """torch.compile traces through without a break, with equal bits."""
    inputs = _inputs([12, 12], [2, 1], 64)
    offsets = torch.tensor([0, 5, 12], dtype=torch.int32)

    def block(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> Tensor:
        ranges = Ranges.packed(cu_seqlens, 7)
        return attention(q.sin(), k, v, ranges, implementation=implementation).out.cos()

    def results(run: Any) -> list[Tensor]:
        leaves = [x.detach().clone().requires_grad_() for x in inputs[:3]]
        out = run(*leaves, offsets)
        return [out.detach(), *torch.autograd.grad(out, leaves, inputs[3])]

    whole = torch.compile(block, backend="aot_eager", fullgraph=True)
    for first, second in zip(results(block), results(whole), strict=True):
        assert torch.equal(first, second)
