"""Cases of RoPE for tests, resource gate and benchmarks."""

from functools import cache
from typing import Any

import torch
from torch import Tensor

from phi4_kernels.registry import CallInputs, Case, Cost, Entry
from phi4_kernels.rope import op, reference
from phi4_kernels.rope.layout import QKVLayout
from phi4_kernels.testing import random_inputs

_BASE = 250_000.0
_PHI4 = {"groups": 10, "queries": 4, "dim": 128}


def _case(name: str, tokens: int, **sizes: Any) -> Case:
    strided = sizes.pop("strided", False)
    return Case(name, {"tokens": tokens, "order": "grouped", "where": None} | sizes, strided)


# Both orders, every source of positions, a partial rotary dimension, heads that are no power of
# two, documents of length 0 and 1, and the empty and single token.
_PROOF = (
    _case("phi4-grouped-documents", 6, **_PHI4, where=(0, 1, 1, 4, 6)),
    _case("phi4-blocked-ids", 4, **_PHI4, order="blocked", where="ids"),
    _case("odd-heads-strided", 7, groups=3, queries=3, dim=48, where="ids", strided=True),
    _case("partial", 5, groups=2, queries=1, dim=64, rotary=24, order="blocked"),
    _case("partial-documents", 9, groups=1, queries=5, dim=96, rotary=80, where=(0, 2, 9)),
    _case("many-documents", 11, groups=1, queries=1, dim=8, where=tuple(range(12))),
    _case("empty", 0, groups=2, queries=2, dim=64),
    _case("one-token", 1, groups=1, queries=1, dim=2, order="blocked", where=(0, 1)),
)
_SOURCES = (("rows", None), ("ids", "ids"), ("documents", (0, 3, 8)))
_SHIPPED = (
    *(_case(f"phi4-{kind}", 8, **_PHI4, where=where) for kind, where in _SOURCES),
    _case("phi4-blocked", 8, **_PHI4, order="blocked"),
    _case("small", 8, groups=1, queries=2, dim=128),
    _case("wide", 8, groups=8, queries=8, dim=256),
    _case("widest", 8, groups=32, queries=4, dim=256),
    _case("partial", 8, groups=10, queries=4, dim=128, rotary=96),
)
_BENCH = (
    _case("t4096-grouped-ids", 4096, **_PHI4, where="ids"),
    _case("t16384-grouped-ids", 16384, **_PHI4, where="ids"),
    _case("t16384-blocked-ids", 16384, **_PHI4, order="blocked", where="ids"),
    _case("t16384-grouped-512-docs", 16384, **_PHI4, where=tuple(range(0, 16385, 32))),
)


@cache
def _tables(num_positions: int, rotary_dim: int) -> tuple[Tensor, Tensor]:
    return op.rope_tables(num_positions, rotary_dim, _BASE)


def _layout(case: Case) -> QKVLayout:
    sizes = case.sizes
    return QKVLayout(sizes["groups"], sizes["queries"], sizes["dim"], sizes["order"])


def _make(case: Case, dtype: torch.dtype) -> CallInputs:
    generator, layout = case.generator(), _layout(case)
    tokens, where = case.sizes["tokens"], case.sizes["where"]
    # Ids come from all of a long table, in no order, as packed documents' positions do.
    num_positions = 16384 if where == "ids" else max(tokens, 1)
    cos, sin = _tables(num_positions, case.sizes.get("rotary", layout.head_dim))
    constants = {"layout": layout, "cos": cos, "sin": sin}
    if where == "ids":
        constants["position_ids"] = torch.randint(num_positions, (tokens,), generator=generator)
    elif where is not None:
        constants["cu_seqlens"] = torch.tensor(where, dtype=torch.int32)
    qkv = random_inputs.rows((tokens, layout.width), dtype, generator, strided=case.strided)
    return CallInputs({"qkv": qkv}, constants)


def _in_place(qkv: Tensor, **arguments: Any) -> tuple[Tensor, ...]:
    """The op on a copy with the same strides: it overwrites an activation, never a leaf."""
    copy = torch.empty_strided(qkv.shape, qkv.stride(), dtype=qkv.dtype, device=qkv.device)
    return op.rope_qkv(copy.copy_(qkv), **arguments)


def _cost(case: Case, dtype: torch.dtype) -> dict[str, Cost]:
    tokens, layout = case.sizes["tokens"], _layout(case)
    half = case.sizes.get("rotary", layout.head_dim) // 2
    rotated = layout.num_query_heads + layout.num_groups
    tables = f"T * 2 * {half} * 4 B"

    def cost(heads: int) -> Cost:
        # Read and written in place, and a row of cos and one of sin per token.
        per_token = 2 * heads * layout.head_dim * dtype.itemsize + 2 * half * 4
        formula = f"2 * T * {heads} * {layout.head_dim} * {dtype.itemsize} B + {tables}"
        return Cost(tokens * per_token, tokens * rotated * half * 6, formula)

    # Backward also packs dv, which forward does not touch.
    return {"forward": cost(rotated), "backward": cost(rotated + layout.num_groups)}


ENTRIES = (
    Entry(
        op="rope",
        name="rope_qkv",
        function=_in_place,
        timed=op.rope_qkv,
        reference=reference.rope_qkv,
        make=_make,
        proof_cases=_PROOF,
        shipped_cases=_SHIPPED,
        bench_cases=_BENCH,
        cost=_cost,
    ),
)
