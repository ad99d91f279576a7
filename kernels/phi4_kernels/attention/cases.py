"""Cases of attention for tests, resource gate and benchmarks.

The gradient of a softmax over few or peaked terms is a difference of almost equal numbers. Eager
loses an arbitrary number of digits there, so a bound relative to eager's error is not meaningful.
Therefore the scales of queries are at most 1 with keys at 1, groups are large where a key has few
queries, and the differentiated entry excludes queries that see fewer than 4 keys.
`attention_forward` excludes nothing, has values from 1e-3 to 1e3 and a peaked case. The gradients
of tiny documents are checked by the op's tests.
"""

from dataclasses import replace

import torch

from phi4_kernels.attention import decoding, op, reference
from phi4_kernels.attention.cache_inputs import cached, drawn_cache, over_table
from phi4_kernels.attention.case_inputs import (
    apart,
    drawn,
    finite,
    head_sizes,
    over_ranges,
    packed,
    spoiled,
    visible_keys,
)
from phi4_kernels.attention.ranges import Ranges
from phi4_kernels.registry import CallInputs, Case, Cost, Entry
from phi4_kernels.testing import random_inputs

_FEWEST_KEYS = 4
_PHI4 = {"heads": 40, "groups": 10, "dim": 128}

_SMALL = head_sizes(2, 1, 64)
_RANGES = apart(
    "ranges", [2, 14, 14, 37, 40, 43], [1, 13, 16, 70, 73], [13, 13, 62, 70, 75], **_SMALL
)
# Group sizes 1, 2, 4 and 8, one or several key heads, every head dim, both rows of the ladders,
# ragged tails, a cache, gaps between keys, more queries than keys, and neither.
_PROOF = (
    packed("phi4-documents", [3, 1, 30, 9], **head_sizes(4, 2, 128)),
    packed("two-tiles", [70], **_SMALL),
    packed("long-tiles", [129, 9], **head_sizes(2, 1, 64), longest=1000),
    packed("group-of-8", [20], **head_sizes(8, 1, 96), strided=True),
    packed("not-causal", [6, 40, 1], **head_sizes(2, 2, 64), causal=False, longest=1000),
    _RANGES,
    packed("empty", [], **_SMALL),
)
_WIDE = {"spread": 1e3}
_FORWARD_PROOF = (
    replace(_RANGES, sizes=_RANGES.sizes | _WIDE),
    apart(
        "decoding",
        [0, 1, 2, 3],
        [0, 72, 80],
        [70, 73, 149],
        **head_sizes(4, 2, 64),
        **_WIDE,
        longest=1,
    ),
    packed(
        "tiny-documents", [1, 1, 2, 1, 3, 1, 5, 1], **head_sizes(2, 1, 96), **_WIDE, strided=True
    ),
    packed("phi4-heads", [2], **head_sizes(40, 10, 64), longest=1),
    packed("peaked", [30], **_SMALL, **_WIDE, high=1e3),
)
# A step of ring attention, later queries against earlier keys; and a case with all keys.
_PARTS = (
    apart("far-keys", [25, 59], [0], [25], **head_sizes(4, 2, 64), keys=60, causal=False),
    packed("all-keys", [60], **head_sizes(4, 1, 64), strided=True),
)
_SHIPPED = tuple(
    packed(f"d{dim}-up-to-{longest}", [8], **head_sizes(4, 1, dim), longest=longest)
    for dim, longest in ((64, 512), (64, 4096), (96, 4096), (128, 1), (128, 512), (128, 4096))
)
# Enough programs that dk and dv are not split, with numbers of heads that 16 does not divide.
_SHIPPED += tuple(
    packed(f"d{dim}-many-heads", [8], **head_sizes(1202, 601, dim), longest=4096)
    for dim in (64, 96, 128)
)
# Decoding. Parts are of 256 keys: none, one, a full one, two and three of them; scores far apart
# from part to part; queries that see no key of a sequence's last part; groups of 1, 4 and 20 heads,
# the last more than a tile has rows; more queries than keys; blocks smaller than a tile's keys,
# larger, and of no power of two; blocks that two sequences share.
_DECODED = (
    cached("peaked", [2], [530], **_SMALL, **_WIDE, high=1e3),
    cached("unequal-lengths", [1, 1, 1], [300, 0, 256], **_SMALL, **_WIDE, block_tokens=64),
    cached("few-queries", [3, 0, 2], [257, 4, 1], **head_sizes(4, 1, 64), **_WIDE),
    cached("groups-of-4", [1], [40], **head_sizes(8, 2, 64)),
    cached(
        "group-of-1", [1, 1], [70, 1], **head_sizes(2, 2, 96), **_WIDE, block_tokens=5, strided=True
    ),
    cached("group-of-20", [1], [67], **head_sizes(20, 1, 128)),
    cached("shared-prompt", [3, 1], [33, 40], **_SMALL, shared=2, causal=False),
    cached("empty", [], [], **_SMALL),
)
_DECODED_SHIPPED = tuple(
    cached(f"d{dim}", [1, 1], [300, 8], **head_sizes(40, 10, dim)) for dim in (64, 96, 128)
)
_DECODED_BENCH = tuple(
    cached(f"{sequences}-of-{keys}", [1] * sequences, [keys] * sequences, **_PHI4)
    for sequences, keys in ((1, 4096), (1, 16384), (16, 1024), (64, 4096))
)
# Log-uniform in length from 64 to 4096 tokens, in no order: 64 documents in 63,174 tokens.
_MIXED = tuple(round(64 * 64 ** (i * 37 % 64 / 63)) for i in range(64))
_BENCH = (
    *(packed(f"t{tokens}", [tokens], **_PHI4) for tokens in (4096, 8192, 16384)),
    packed("64-documents", _MIXED, **_PHI4),
)


def _make(case: Case, dtype: torch.dtype) -> CallInputs:
    inputs = drawn(case, dtype)
    return CallInputs(spoiled(case, inputs.tensors), inputs.constants)


def _make_differentiated(case: Case, dtype: torch.dtype) -> CallInputs:
    inputs = _make(case, dtype)
    if case in _BENCH:
        return inputs
    # The module docstring gives the reason for excluding queries of few keys.
    kept = (visible_keys(case) >= _FEWEST_KEYS).nonzero().squeeze(1)
    return CallInputs(inputs.tensors, inputs.constants | {"kept": kept})


def _make_part(case: Case, dtype: torch.dtype) -> CallInputs:
    """Inputs of backward: the results are those of one causal range over all tokens."""
    inputs, tokens = drawn(case, dtype), case.sizes["tokens"]
    whole = Ranges.of([0, tokens], [0], [tokens])
    scale = inputs.constants["scale"]
    # out and lse over all keys: backward of a part takes the merged ones.
    q, k, v = inputs.tensors.values()
    out, lse = reference.attention_forward(q, k, v, whole, causal=True, scale=scale)
    high = random_inputs.gradient_high(dtype)
    dout = random_inputs.rows(
        tuple(out.shape), dtype, case.generator(), high=high, strided=case.strided
    )
    # The same here: a query of few keys gets no gradient to lose digits in.
    dout[: _FEWEST_KEYS - 1] = 0.0
    tensors = spoiled(case, {"dout": dout} | inputs.tensors | {"out": out})
    return CallInputs(tensors, inputs.constants | {"lse": lse})


def _cost(case: Case, dtype: torch.dtype) -> dict[str, Cost]:
    sizes, itemsize = case.sizes, dtype.itemsize
    heads, groups, dim = sizes["heads"], sizes["groups"], sizes["dim"]
    # A causal document of n tokens has n (n + 1) / 2 pairs; n^2 / 2 as in FlashAttention's counts.
    pairs = sum(length**2 for length in sizes["lengths"]) // 2

    def cost(products: int, of_queries: int, of_keys: int, rows: int) -> Cost:
        """Per head `products` of 2 * pairs * D FLOPs; per token tensors, and `rows` fp32 values."""
        elements = (of_queries * heads + of_keys * groups) * dim
        per_token = elements * itemsize + rows * heads * 4
        formula = (
            f"T * ({of_queries} * {heads} + {of_keys} * {groups}) * {dim} * {itemsize} B "
            f"+ T * {rows * heads} * 4 B"
        )
        flops = products * 2 * pairs * heads * dim
        return Cost(sizes["tokens"] * per_token, flops, formula)

    # Forward: s and p v; reads q, k, v, writes out and lse. Backward: s, dp, dv, dq, dk; reads
    # dout, q, k, v, out and lse, writes dq, dk, dv.
    return {"forward": cost(2, 2, 2, 1), "backward": cost(5, 4, 4, 1)}


def _decode_cost(case: Case, dtype: torch.dtype) -> dict[str, Cost]:
    """One query per sequence: it meets every key."""
    heads, groups, dim = (case.sizes[name] for name in ("heads", "groups", "dim"))
    tokens, keys = case.sizes["tokens"], sum(case.sizes["lengths"])
    formula = (
        f"T * (2 * {heads} * {dim} * {dtype.itemsize} + {heads} * 4) B "
        f"+ {keys} * 2 * {groups} * {dim} * {dtype.itemsize} B"
    )
    # q and out once per query, every cached key and value once, lse.
    moved = tokens * (2 * heads * dim * dtype.itemsize + heads * 4)
    moved += keys * 2 * groups * dim * dtype.itemsize
    return {"forward": Cost(moved, 2 * 2 * keys * heads * dim, formula)}


ENTRIES = (
    Entry(
        op="attention",
        name="attention",
        function=over_ranges(lambda *args, **options: op.attention(*args, **options).out),
        reference=over_ranges(reference.attention),
        make=_make_differentiated,
        proof_cases=_PROOF,
        shipped_cases=_SHIPPED,
        bench_cases=_BENCH,
        cost=_cost,
    ),
    Entry(
        op="attention",
        name="attention_forward",
        function=over_ranges(finite(op.attention_forward)),
        reference=over_ranges(finite(reference.attention_forward)),
        make=_make,
        proof_cases=_FORWARD_PROOF,
        shipped_cases=(),
        bench_cases=(),
        cost=_cost,
        differentiable=False,
    ),
    Entry(
        op="attention",
        name="attention_backward",
        function=over_ranges(op.attention_backward),
        reference=over_ranges(reference.attention_backward),
        make=_make_part,
        proof_cases=_PARTS,
        shipped_cases=(),
        bench_cases=(),
        cost=_cost,
        differentiable=False,
    ),
    Entry(
        op="attention",
        name="attention_decode",
        function=over_table(finite(decoding.attention_decode)),
        reference=over_table(finite(reference.attention_decode)),
        make=drawn_cache,
        proof_cases=_DECODED,
        shipped_cases=_DECODED_SHIPPED,
        bench_cases=_DECODED_BENCH,
        cost=_decode_cost,
        differentiable=False,
        step="decode",
    ),
)
