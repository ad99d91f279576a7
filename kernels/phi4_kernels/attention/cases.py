"""What tests, resource gate and benchmarks run of attention.

The gradient of a softmax over few or peaked terms is a difference of almost equal numbers, in which
eager loses its digits by chance and a rule relative to eager binds nobody. So queries lie at scales
up to 1 against keys at 1, groups are large where a key has few queries, and the differentiated
entry leaves out queries of fewer than 4 keys. `attention_forward` leaves out nothing, has values
from 1e-3 to 1e3 and a peaked case; tests of the op hold the gradients of tiny documents.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from phi4_kernels.attention import op, reference
from phi4_kernels.attention.ranges import Ranges
from phi4_kernels.registry import CallInputs, Case, Cost, Entry
from phi4_kernels.testing import random_inputs

_FEWEST_KEYS = 4
_DEFAULTS = {"causal": True, "high": 1.0, "spread": 1.0}
_PHI4 = {"heads": 40, "groups": 10, "dim": 128}


def _case(name: str, lengths: Sequence[int], *, strided: bool = False, **sizes: Any) -> Case:
    """Packed documents."""
    tokens = sum(lengths)
    offsets = [0, *(sum(lengths[: i + 1]) for i in range(len(lengths)))]
    where = {"offsets": offsets, "starts": offsets[:-1], "ends": offsets[1:]}
    mine = {"tokens": tokens, "keys": tokens, "lengths": tuple(lengths), **where, **_DEFAULTS}
    return Case(name, mine | {"longest": max(lengths, default=0)} | sizes, strided)


def _apart(name: str, offsets: list[int], starts: list[int], ends: list[int], **sizes: Any) -> Case:
    """Queries and keys apart, with a token outside at the end of both; what lies outside is NaN, as
    memory may be that nobody has written."""
    where = {"offsets": offsets, "starts": starts, "ends": ends, "lengths": None, "longest": 64}
    return Case(
        name, {"tokens": offsets[-1] + 1, "keys": ends[-1] + 1, **where, **_DEFAULTS} | sizes
    )


def _heads(heads: int, groups: int, dim: int) -> dict[str, int]:
    return {"heads": heads, "groups": groups, "dim": dim}


_SMALL = _heads(2, 1, 64)
_RANGES = _apart(
    "ranges", [2, 14, 14, 37, 40, 43], [1, 13, 16, 70, 73], [13, 13, 62, 70, 75], **_SMALL
)
# Group sizes 1, 2, 4 and 8, one key head and several, every head dim, both rows of the ladders,
# ragged tails, a cache, gaps between keys, more queries than keys, and neither.
_PROOF = (
    _case("phi4-documents", [3, 1, 30, 9], **_heads(4, 2, 128)),
    _case("two-tiles", [70], **_SMALL),
    _case("long-tiles", [129, 9], **_heads(2, 1, 64), longest=1000),
    _case("group-of-8", [20], **_heads(8, 1, 96), strided=True),
    _case("not-causal", [6, 40, 1], **_heads(2, 2, 64), causal=False),
    _RANGES,
    _case("empty", [], **_SMALL),
)
_WIDE = {"spread": 1e3}
_FORWARD_PROOF = (
    replace(_RANGES, sizes=_RANGES.sizes | _WIDE),
    _apart(
        "decoding", [0, 1, 2, 3], [0, 72, 80], [70, 73, 149], **_heads(4, 2, 64), **_WIDE, longest=1
    ),
    _case("tiny-documents", [1, 1, 2, 1, 3, 1, 5, 1], **_heads(2, 1, 96), **_WIDE, strided=True),
    _case("phi4-heads", [2], **_heads(40, 10, 64), longest=1),
    _case("peaked", [30], **_SMALL, **_WIDE, high=1e3),
)
# A ring's step: the far keys of the later queries; and all there is.
_PARTS = (
    _apart("far-keys", [25, 59], [0], [25], **_heads(4, 2, 64), keys=60, causal=False),
    _case("all-keys", [60], **_heads(4, 1, 64), strided=True),
)
_SHIPPED = tuple(
    _case(f"d{dim}-up-to-{longest}", [8], **_heads(4, 1, dim), longest=longest)
    for dim, longest in ((64, 512), (64, 4096), (96, 4096), (128, 1), (128, 512), (128, 4096))
)
# Log-uniform in length from 64 to 4096 tokens, in no order: 64 documents in 63,174 tokens.
_MIXED = tuple(round(64 * 64 ** (i * 37 % 64 / 63)) for i in range(64))
_BENCH = (
    *(_case(f"t{tokens}", [tokens], **_PHI4) for tokens in (4096, 8192, 16384)),
    _case("64-documents", _MIXED, **_PHI4),
)


def _visible_keys(case: Case) -> Tensor:
    """[T]: how many keys each query sees."""
    counts = torch.zeros(case.sizes["tokens"], dtype=torch.int64)
    offsets, starts, ends = (case.sizes[name] for name in ("offsets", "starts", "ends"))
    for (first, last), k_start, k_end in zip(pairwise(offsets), starts, ends, strict=True):
        after = torch.arange(last - first).flip(0) if case.sizes["causal"] else 0
        counts[first:last] = k_end - k_start - after
    return counts.clamp_(min=0)


def _outside(case: Case) -> tuple[Tensor, Tensor]:
    """Queries and keys that lie in no range."""
    offsets, starts, ends = (case.sizes[name] for name in ("offsets", "starts", "ends"))
    queries = torch.ones(case.sizes["tokens"], dtype=torch.bool)
    keys = torch.ones(case.sizes["keys"], dtype=torch.bool)
    queries[offsets[0] : offsets[-1]] = False
    for start, end in zip(starts, ends, strict=True):
        keys[start:end] = False
    return queries, keys


def _spoiled(case: Case, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors with NaN in all tokens outside of the ranges."""
    queries, keys = _outside(case)
    for name, tensor in tensors.items():
        tensor[keys if name in ("k", "v") else queries] = torch.nan
    return tensors


def _constants(case: Case) -> dict[str, Any]:
    sizes = case.sizes
    where = {
        name: torch.tensor(sizes[name], dtype=torch.int32) for name in ("offsets", "starts", "ends")
    }
    options = {name: sizes[name] for name in ("longest", "causal", "lengths")}
    return where | options | {"scale": sizes["dim"] ** -0.5}


def _make(case: Case, dtype: torch.dtype) -> CallInputs:
    inputs = _drawn(case, dtype)
    return CallInputs(_spoiled(case, inputs.tensors), inputs.constants)


def _drawn(case: Case, dtype: torch.dtype) -> CallInputs:
    sizes, dim = case.sizes, case.sizes["dim"]
    like = {"dtype": dtype, "generator": case.generator(), "strided": case.strided}
    of_queries = sizes["tokens"], sizes["heads"], dim
    of_keys = sizes["keys"], sizes["groups"], dim
    tensors = {
        "q": random_inputs.rows(of_queries, **like, high=sizes["high"]),
        "k": random_inputs.rows(of_keys, **like, low=1.0, high=1.0),
        "v": random_inputs.rows(of_keys, **like, low=1 / sizes["spread"], high=sizes["spread"]),
    }
    return CallInputs(tensors, _constants(case))


def _make_differentiated(case: Case, dtype: torch.dtype) -> CallInputs:
    inputs = _make(case, dtype)
    if case in _BENCH:
        return inputs
    kept = (_visible_keys(case) >= _FEWEST_KEYS).nonzero().squeeze(1)
    return CallInputs(inputs.tensors, inputs.constants | {"kept": kept})


def _make_part(case: Case, dtype: torch.dtype) -> CallInputs:
    """Inputs of backward: the results are those of one causal range over all tokens."""
    inputs, tokens = _drawn(case, dtype), case.sizes["tokens"]
    whole = Ranges.of([0, tokens], [0], [tokens])
    scale = inputs.constants["scale"]
    tensors = inputs.tensors.values()
    out, lse = reference.attention_forward(*tensors, whole, causal=True, scale=scale)
    high = random_inputs.gradient_high(dtype)
    dout = random_inputs.rows(
        tuple(out.shape), dtype, case.generator(), high=high, strided=case.strided
    )
    dout[: _FEWEST_KEYS - 1] = 0.0
    tensors = _spoiled(case, {"dout": dout} | inputs.tensors | {"out": out})
    return CallInputs(tensors, inputs.constants | {"lse": lse})


def _over_ranges(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` with its ranges as tensors of their own, so that the lab can place them."""

    def run(
        *tensors: Tensor,
        offsets: Tensor,
        starts: Tensor,
        ends: Tensor,
        longest: int,
        lengths: tuple[int, ...] | None,
        kept: Tensor | None = None,
        **others: Any,
    ) -> Any:
        named = {name: others.pop(name) for name in _TENSORS if name in others}
        ranges = Ranges(offsets, starts, ends, longest, longest)
        result = function(*tensors, **named, ranges=ranges, **others)
        return result if kept is None else result[kept]

    return run


_TENSORS = ("dout", "q", "k", "v", "out", "lse")


def _finite(function: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
    """With 0 for the lse of -inf of a query without keys: no rule compares infinities."""

    def run(*args: Any, **options: Any) -> tuple[Tensor, Tensor]:
        out, lse = function(*args, **options)
        return out, torch.where(lse == -torch.inf, 0.0, lse)

    return run


def _cost(case: Case, dtype: torch.dtype) -> dict[str, Cost]:
    sizes, itemsize = case.sizes, dtype.itemsize
    heads, groups, dim = sizes["heads"], sizes["groups"], sizes["dim"]
    pairs = sum(length**2 for length in sizes["lengths"]) // 2

    def cost(products: int, of_queries: int, of_keys: int, rows: int) -> Cost:
        """Products of 2 * pairs * D flops, and per token so many tensors and fp32 of a head."""
        elements = (of_queries * heads + of_keys * groups) * dim
        per_token = elements * itemsize + rows * heads * 4
        formula = (
            f"T * ({of_queries} * {heads} + {of_keys} * {groups}) * {dim} * {itemsize} B "
            f"+ T * {rows * heads} * 4 B"
        )
        flops = products * 2 * pairs * heads * dim
        return Cost(sizes["tokens"] * per_token, flops, formula)

    return {"forward": cost(2, 2, 2, 1), "backward": cost(5, 4, 4, 1)}


ENTRIES = (
    Entry(
        op="attention",
        name="attention",
        function=_over_ranges(lambda *args, **options: op.attention(*args, **options).out),
        reference=_over_ranges(reference.attention),
        make=_make_differentiated,
        proof_cases=_PROOF,
        shipped_cases=_SHIPPED,
        bench_cases=_BENCH,
        cost=_cost,
    ),
    Entry(
        op="attention",
        name="attention_forward",
        function=_over_ranges(_finite(op.attention_forward)),
        reference=_over_ranges(_finite(reference.attention_forward)),
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
        function=_over_ranges(op.attention_backward),
        reference=_over_ranges(reference.attention_backward),
        make=_make_part,
        proof_cases=_PARTS,
        shipped_cases=(),
        bench_cases=(),
        cost=_cost,
        differentiable=False,
    ),
)
