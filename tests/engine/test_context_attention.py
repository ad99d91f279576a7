"""Attention over rows that context ranks share equals attention over whole rows, by both routes.

Real ranks over gloo, random documents across their borders, held to the error rule of the kernels.
A merge without its correction and blocks in a wrong order must break it.
"""

from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from phi4_kernels.attention import Attention, Ranges, reference
from phi4_kernels.testing.error_rule import check

from phi4.config import ParallelConfig
from phi4.engine.layout import Layout, context_chunks
from phi4.engine.model import context_attention
from phi4.engine.model.context_attention import AllGatherAttention, RingAttention, merge
from phi4.engine.model.document_ranges import visible_keys
from phi4.engine.patches import Patches
from phi4.stages.pretrain import NextToken
from tests.support.engines import batches_of, engine_on, tiny_recipe
from tests.support.ranks import gloo_group, pool_fixture

HEADS, GROUPS, DIM = 4, 2, 16
ROUTES = {"all_gather": AllGatherAttention, "ring": RingAttention}
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Rows:
    """Rows of documents that cp_size ranks share."""

    num_rows: int
    length: int
    cp_size: int
    bounds: tuple[int, ...]
    dtype: torch.dtype = torch.float32

    @property
    def cu_seqlens(self) -> np.ndarray:
        """Every row start is a boundary."""
        starts = {row * self.length for row in range(self.num_rows + 1)}
        return np.array(sorted(starts | set(self.bounds)), dtype=np.int32)

    def tensors(self) -> Tensors:
        """q, k, v and the gradient of the result, [length, rows, heads, DIM]."""
        generator = torch.Generator().manual_seed(len(self.bounds))
        heads = {"q": HEADS, "k": GROUPS, "v": GROUPS, "dout": HEADS}
        return {
            name: torch.randn(self.length, self.num_rows, n, DIM, generator=generator).to(
                self.dtype
            )
            for name, n in heads.items()
        }


@st.composite
def rows(draw: st.DrawFn) -> Rows:
    cp_size, num_rows = draw(st.sampled_from([2, 4])), draw(st.integers(1, 2))
    length = 2 * cp_size * draw(st.integers(1, 6))
    bounds = draw(st.sets(st.integers(1, num_rows * length - 1), max_size=6))
    return Rows(num_rows, length, cp_size, tuple(sorted(bounds)))


ACROSS_ALL_RANKS = Rows(1, 64, 4, (3, 61))
LONG = Rows(2, 192, 4, (5, 29, 31, 170, 192 + 77, 192 + 80))
TOLERANCE = 1e-6
"""Of the largest number or of 1, the inputs' size, in fp32. The error rule wants more numbers than
the smallest rows have."""


pool = pool_fixture(4)


@pytest.mark.parametrize("route", ROUTES)
@settings(max_examples=6)
@given(st.lists(rows(), min_size=4, max_size=4))
def test_split_rows_equal_whole_rows(pool, route, batches):
    found = pool.run(attend, route, [ACROSS_ALL_RANKS, *batches])
    errors = map(largest_error, [ACROSS_ALL_RANKS, *batches], zip(*found, strict=True))
    assert max(errors) <= TOLERANCE


@pytest.mark.parametrize("fault", ["merge without correction", "blocks the wrong way round"])
def test_a_broken_ring_is_found(pool, fault):
    found = pool.run(attend, "ring", [ACROSS_ALL_RANKS], fault)
    assert largest_error(ACROSS_ALL_RANKS, [local for (local,) in found]) > 1000 * TOLERANCE


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("route", ROUTES)
def test_split_rows_keep_the_error_rule(pool, route, dtype):
    batch = replace(LONG, dtype=dtype)
    by_rank = [local for (local,) in pool.run(attend, route, [batch])]
    given_tensors, found = batch.tensors(), together(batch, by_rank)
    truth = whole_rows(batch, {name: x.double() for name, x in given_tensors.items()})
    eager = whole_rows(batch, given_tensors)
    # The gradient of a query that sees one key is noise around an exact 0.
    several = torch.ones(batch.num_rows * batch.length, dtype=torch.bool)
    several[batch.cu_seqlens[:-1]] = False
    for name in truth:
        kept = several if name == "dq" else slice(None)
        check(name, found[name][kept], eager[name][kept], truth[name][kept])


def test_gradients_of_the_ring_are_bitwise_the_same_in_every_run(pool):
    for first, second in pool.run(attend, "ring", [ACROSS_ALL_RANKS] * 2):
        assert all(torch.equal(first[name], second[name]) for name in first)


def test_merging_parts_of_the_keys_is_attention_over_all():
    q, k, v = (torch.randn(5, 2, 8, dtype=torch.float64) for _ in range(3))
    options = {"causal": False, "scale": 0.4}
    whole = reference.attention_forward(q, k, v, Ranges.of([0, 5], [0], [5]), **options)
    some, others = (
        Attention(*reference.attention_forward(q, k, v, Ranges.of([0, 5], [a], [b]), **options))
        for a, b in ((0, 2), (2, 5))
    )
    nothing = Attention(torch.zeros(5, 2, 8), torch.full((5, 2), -torch.inf))
    merged = merge(merge(merge(None, some), others), nothing)
    assert torch.allclose(merged.out.double(), whole[0], rtol=1e-5)
    assert torch.allclose(merged.lse.double(), whole[1], rtol=1e-6)


def test_blocks_that_no_document_shares_are_not_attended(pool):
    a_document_per_chunk = Rows(1, 32, 4, tuple(range(4, 32, 4)))
    one_document = Rows(1, 32, 4, ())
    calls = pool.run(count_calls, [a_document_per_chunk, one_document])
    assert calls == [[2, 2 + 2 * rank + (3 - rank)] for rank in range(4)]


def test_the_next_block_is_on_its_way_while_the_present_one_is_attended(pool):
    events = pool.run(order_of_events, Rows(1, 32, 4, ()))[3]
    present = ["start", "attend", "attend", "wait"]
    assert events[:14] == [*present * 3, "attend", "attend"]
    # Backward also has a gradient on its way from the second block on.
    first = ["start", "attend back", "attend back", "start", "wait"]
    others = ["start", "attend back", "attend back", "wait", "start", "wait"]
    last = ["attend back", "attend back", "wait", "start", "wait"]
    assert events[14:] == [*first, *others * 2, *last]


@pytest.mark.parametrize(("route", "granularity"), [("ring", "selective"), ("all_gather", "full")])
def test_recompute_is_bitwise_the_same(pool, route, granularity):
    overrides = ("parallel.context=2", f"parallel.context_attention={route}")
    kept = pool.run(train, overrides)
    again = pool.run(train, (*overrides, f"recompute.granularity={granularity}"))
    assert kept == again


def largest_error(batch: Rows, by_rank: Sequence[Tensors | None]) -> float:
    """Of results and gradients, as TOLERANCE counts it."""
    found = together(batch, by_rank)
    truth = whole_rows(batch, {name: x.double() for name, x in batch.tensors().items()})
    return max(
        float((found[name] - exact).abs().max() / exact.abs().max().clamp_min(1.0))
        for name, exact in truth.items()
    )


def together(batch: Rows, by_rank: Sequence[Tensors | None]) -> Tensors:
    """The ranks' slices as whole rows, in order."""
    found = {name: torch.empty(batch.length, *x.shape[1:]) for name, x in by_rank[0].items()}
    for rank, local in enumerate(by_rank[: batch.cp_size]):
        columns = context_chunks(batch.length, rank, batch.cp_size)
        for name, whole in found.items():
            for (start, end), piece in zip(columns, local[name].chunk(2), strict=True):
                whole[start:end] = piece
    return {name: flattened(whole.to(batch.dtype)) for name, whole in found.items()}


def whole_rows(batch: Rows, tensors: Tensors) -> Tensors:
    """The definition, rows in order."""
    q, k, v, dout = (flattened(tensors[name]) for name in ("q", "k", "v", "dout"))
    ranges = Ranges.packed(torch.from_numpy(batch.cu_seqlens), batch.length)
    options = {"causal": True, "scale": DIM**-0.5}
    out, lse = reference.attention_forward(q, k, v, ranges, **options)
    gradients = reference.attention_backward(dout, q, k, v, out, lse, ranges, **options)
    return {"out": out, **dict(zip(("dq", "dk", "dv"), gradients, strict=True))}


def flattened(x_SBND: torch.Tensor) -> torch.Tensor:
    return x_SBND.transpose(0, 1).flatten(0, 1)


# What follows runs in the ranks.


def attend(
    rank: int, world_size: int, route: str, batches: list[Rows], fault: str = ""
) -> list[Tensors | None]:
    """This rank's slices of the results and of the gradients."""
    with gloo_group(rank, world_size), Patches("cpu"), faulty(fault):
        groups = {size: dist.new_group(list(range(size))) for size in (2, 4)}
        return [
            attend_one(rank, route, batch, groups[batch.cp_size]) if rank < batch.cp_size else None
            for batch in batches
        ]


def attend_one(rank: int, route: str, batch: Rows, group: dist.ProcessGroup) -> Tensors:
    parallel = ParallelConfig(context=batch.cp_size, context_attention=route)
    layout = Layout(parallel, 0, 0, rank, 0, 1, SimpleNamespace())
    local = {
        name: layout.context_slice(x.transpose(0, 1)).transpose(0, 1)
        for name, x in batch.tensors().items()
    }
    q, k, v = (local[name].requires_grad_() for name in ("q", "k", "v"))
    visible = visible_keys(batch.cu_seqlens, batch.num_rows, batch.length, layout)
    options = {"scale": DIM**-0.5, "implementation": "torch"}
    out = ROUTES[route].apply(q, k, v, visible, group, options)
    dq, dk, dv = torch.autograd.grad(out, (q, k, v), local["dout"])
    return {"out": out.detach(), "dq": dq, "dk": dk, "dv": dv}


def count_calls(rank: int, world_size: int, batches: list[Rows]) -> list[int]:
    """Forward calls of the op for each batch."""
    counts = []
    for batch in batches:
        op = mock.Mock(side_effect=context_attention.attention_forward)
        with mock.patch.object(context_attention, "attention_forward", op):
            attend(rank, world_size, "ring", [batch])
        counts.append(op.call_count)
    return counts


def order_of_events(rank: int, world_size: int, batch: Rows) -> list[str]:
    """When transfers start and end, and when the op is called."""
    events = []

    def noted(name, function):
        return lambda *args, **options: (events.append(name), function(*args, **options))[1]

    with ExitStack() as stack:
        for owner, attribute, name in (
            (context_attention._Transfer, "__init__", "start"),
            (context_attention._Transfer, "wait", "wait"),
            (context_attention, "attention_forward", "attend"),
            (context_attention, "attention_backward", "attend back"),
        ):
            wrapper = noted(name, getattr(owner, attribute))
            stack.enter_context(mock.patch.object(owner, attribute, wrapper))
        attend(rank, world_size, "ring", [batch])
    return events


def train(
    rank: int, world_size: int, overrides: tuple[str, ...]
) -> list[tuple[float, float]] | None:
    """Losses and gradient norms of two steps."""
    with engine_on(rank, tiny_recipe("model.num_layers=2", *overrides)) as engine:
        if engine is None:
            return None
        steps = [
            engine.train_step(batches_of(engine, step)[:2], NextToken(), learning_rate=1e-3)
            for step in range(2)
        ]
    return [(step.loss, step.grad_norm) for step in steps]


def faulty(name: str):
    """A context with the fault of that name."""

    def without_correction(so_far: Attention | None, part: Attention) -> Attention:
        if so_far is None:
            return kept_merge(None, part)
        lse = torch.logaddexp(so_far.lse, part.lse)
        return Attention(so_far.out + part.out * (part.lse - lse).exp().unsqueeze(-1), lse)

    def the_other_way(block, group):
        blocks = list(kept_rotating(block, group))
        return iter([blocks[0], *reversed(blocks[1:])])

    kept_merge, kept_rotating = context_attention.merge, context_attention._rotating
    faults = {
        "merge without correction": ("merge", without_correction),
        "blocks the wrong way round": ("_rotating", the_other_way),
    }
    return mock.patch.object(context_attention, *faults[name]) if name else nullcontext()
