"""Ranges of queries and keys of an attention case, and its random inputs."""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from phi4_kernels.attention.arguments import ANY_RANGES
from phi4_kernels.attention.ranges import Ranges
from phi4_kernels.registry import CallInputs, Case
from phi4_kernels.testing import random_inputs

_DEFAULTS = {"causal": True, "high": 1.0, "spread": 1.0}


def packed(name: str, lengths: Sequence[int], **sizes: Any) -> Case:
    """Packed documents; `strided` leaves gaps between rows."""
    strided = sizes.pop("strided", False)
    tokens = sum(lengths)
    offsets = [0, *(sum(lengths[: i + 1]) for i in range(len(lengths)))]
    where = {"offsets": offsets, "starts": offsets[:-1], "ends": offsets[1:]}
    mine: dict[str, Any] = {"tokens": tokens, "keys": tokens, "lengths": tuple(lengths)}
    mine |= where | _DEFAULTS
    longest = max(lengths, default=0)
    mine |= {"longest": longest} | sizes
    # A smaller `longest` selects another launch row of our kernels; libraries rely on its value.
    are_whole = mine["causal"] and mine["longest"] >= longest
    return Case(name, mine, strided, () if are_whole else (ANY_RANGES,))


def apart(name: str, offsets: list[int], starts: list[int], ends: list[int], **sizes: Any) -> Case:
    """A case whose queries and keys are different tokens, with one token outside all ranges at the
    end of both. Tokens outside are NaN, like uninitialised memory."""
    where = {"offsets": offsets, "starts": starts, "ends": ends, "lengths": None, "longest": 64}
    mine = {"tokens": offsets[-1] + 1, "keys": ends[-1] + 1, **where, **_DEFAULTS} | sizes
    return Case(name, mine, needs=(ANY_RANGES,))


def head_sizes(heads: int, groups: int, dim: int) -> dict[str, int]:
    """Number of query heads, number of key heads, and head dim."""
    return {"heads": heads, "groups": groups, "dim": dim}


def visible_keys(case: Case) -> Tensor:
    """[T]: number of keys that each query sees."""
    counts = torch.zeros(case.sizes["tokens"], dtype=torch.int64)
    offsets, starts, ends = (case.sizes[name] for name in ("offsets", "starts", "ends"))
    for (first, last), k_start, k_end in zip(pairwise(offsets), starts, ends, strict=True):
        # Query i of m sees all keys of its range except those of the m - 1 - i queries after it.
        after = torch.arange(last - first).flip(0) if case.sizes["causal"] else 0
        counts[first:last] = k_end - k_start - after
    return counts.clamp_(min=0)


def outside(case: Case) -> tuple[Tensor, Tensor]:
    """Masks of the queries and keys that are in no range."""
    offsets, starts, ends = (case.sizes[name] for name in ("offsets", "starts", "ends"))
    queries = torch.ones(case.sizes["tokens"], dtype=torch.bool)
    keys = torch.ones(case.sizes["keys"], dtype=torch.bool)
    queries[offsets[0] : offsets[-1]] = False
    for start, end in zip(starts, ends, strict=True):
        keys[start:end] = False
    return queries, keys


def spoiled(case: Case, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors with NaN in all tokens outside of the ranges."""
    queries, keys = outside(case)
    for name, tensor in tensors.items():
        tensor[keys if name in ("k", "v") else queries] = torch.nan
    return tensors


def _constants(case: Case) -> dict[str, Any]:
    sizes = case.sizes
    where = {
        name: torch.tensor(sizes[name], dtype=torch.int32) for name in ("offsets", "starts", "ends")
    }
    names = ("longest", "causal", "lengths")
    options = {name: sizes[name] for name in names if name in sizes}
    return where | options | {"scale": sizes["dim"] ** -0.5}


def drawn(case: Case, dtype: torch.dtype) -> CallInputs:
    """q, k and v of a case, with rows at its scales, and its ranges."""
    sizes, dim = case.sizes, case.sizes["dim"]
    rows = partial(
        random_inputs.rows, dtype=dtype, generator=case.generator(), strided=case.strided
    )
    of_queries = sizes["tokens"], sizes["heads"], dim
    of_keys = sizes["keys"], sizes["groups"], dim
    tensors = {
        "q": rows(of_queries, high=sizes["high"]),
        # Keys at one scale: scores then spread as much as the queries' scales say.
        "k": rows(of_keys, low=1.0, high=1.0),
        # Values from 1 / spread to spread: a row of large values must not drown a small one's
        # error.
        "v": rows(of_keys, low=1 / sizes["spread"], high=sizes["spread"]),
    }
    return CallInputs(tensors, _constants(case))


def over_ranges(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` with the ranges' tensors as separate arguments, which the checks place in
    memory."""

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
        num_tokens = None if lengths is None else sum(lengths)
        ranges = Ranges(offsets, starts, ends, longest, longest, num_tokens)
        result = function(*tensors, **named, ranges=ranges, **others)
        return result if kept is None else result[kept]

    return run


_TENSORS = ("dout", "q", "k", "v", "out", "lse")


def finite(function: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
    """The results with lse in a form that the error rule can compare: finite, and as one row.

    A query without keys has an lse of -inf, here 0. An lse is a logarithm, so its absolute error
    counts. Where a query has one key, lse is a dot product; one whose terms cancel has a large
    relative error, which depends on the order of the sum: on a CPU, on its BLAS.
    """

    def run(*args: Any, **options: Any) -> tuple[Tensor, Tensor]:
        out, lse = function(*args, **options)
        return out, torch.where(lse == -torch.inf, 0.0, lse).reshape(1, -1)

    return run
