"""Hopper attention, emulated: numbers by the error rule, a protocol that holds in any order."""

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from phi4_kernels import registry
from phi4_kernels.attention import Ranges, attention_forward, gluon_impl, reference
from phi4_kernels.attention.gluon_tiles import tiles
from phi4_kernels.errors import DtypeError, GateError
from phi4_kernels.testing import error_rule
from phi4_kernels.testing.gluon_emulator import emulating
from phi4_kernels.testing.gluon_machine import Schedule
from torch import Tensor

SCHEDULES = [Schedule(), Schedule("reversed"), Schedule("shuffled", 1), Schedule("shuffled", 2)]
GRIDS = [1, 7, 66, 132]


class Problem(NamedTuple):
    """Ranges by lengths: (queries, keys, keys between this range and the next)."""

    ranges: tuple[tuple[int, int, int], ...]
    num_heads: int = 2
    num_key_heads: int = 1
    head_dim: int = 64
    causal: bool = True
    dtype: torch.dtype = torch.bfloat16

    def boundaries(self) -> Ranges:
        queries, starts, ends = [0], [], []
        at = 0
        for num_queries, num_keys, gap in self.ranges:
            queries.append(queries[-1] + num_queries)
            starts.append(at)
            ends.append(at + num_keys)
            at = ends[-1] + gap
        return Ranges.of(queries, starts, ends)

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v; keys between ranges are NaN, as memory is that nobody has written."""
        generator = torch.Generator().manual_seed(len(self.ranges))
        num_queries = sum(part[0] for part in self.ranges)
        num_keys = sum(part[1] + part[2] for part in self.ranges)
        shapes = [(num_queries, self.num_heads), *[(num_keys, self.num_key_heads)] * 2]
        q, k, v = (torch.randn(*s, self.head_dim, generator=generator) for s in shapes)
        at = 0
        for _, length, gap in self.ranges:
            k[at + length : at + length + gap] = v[at + length : at + length + gap] = torch.nan
            at += length + gap
        return q.to(self.dtype), k.to(self.dtype), v.to(self.dtype)


def packed(*lengths: int) -> tuple[tuple[int, int, int], ...]:
    return tuple((length, length, 0) for length in lengths)


def run(
    problem: Problem, schedule: Schedule | None = None, num_processors: int = 2
) -> tuple[Tensor, Tensor]:
    ranges, tensors = problem.boundaries(), problem.tensors()
    with emulating(schedule, num_processors):
        return attention_forward(*tensors, ranges, causal=problem.causal, implementation="gluon")


def check(problem: Problem, ours: tuple[Tensor, Tensor]) -> None:
    """Out by the error rule; lse as well, where it is finite."""
    ranges, tensors = problem.boundaries(), problem.tensors()
    constants = {"causal": problem.causal, "scale": problem.head_dim**-0.5}
    eager = reference.attention_forward(*tensors, ranges, **constants)
    truth = reference.attention_forward(*(x.double() for x in tensors), ranges, **constants)
    error_rule.check("out", ours[0], eager[0], truth[0])
    seen = truth[1].isfinite()
    assert torch.equal(ours[1].isfinite(), seen) and not ours[0][~seen].any()
    columns = (x[seen].unsqueeze(1) for x in (ours[1], eager[1], truth[1]))
    error_rule.check("lse", *columns)


PROBLEMS = {
    "one document": Problem(packed(300)),
    "whole blocks": Problem(packed(256)),
    "one token": Problem(packed(1)),
    "phi-4's heads": Problem(packed(129), num_heads=4, head_dim=128),
    "8 to 1, head dim 96": Problem(packed(70, 130), num_heads=8, head_dim=96),
    "1 to 1, fp16": Problem(packed(90, 260), num_heads=2, num_key_heads=2, dtype=torch.float16),
    "not causal": Problem(packed(130, 257), causal=False),
    "tiny documents": Problem(packed(1, 1, 3, 0, 130, 1, 2, 63, 64, 65)),
    "cache": Problem(((1, 200, 57), (3, 129, 0), (2, 128, 127))),
    "cache, not causal": Problem(((1, 200, 57), (3, 129, 1)), causal=False),
    "more queries than keys": Problem(((200, 70, 3), (5, 0, 0), (140, 139, 0))),
    "no keys": Problem(((3, 0, 0),)),
    "no ranges": Problem(()),
}


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize("name", PROBLEMS)
def test_forward_obeys_the_error_rule(name: str, schedule: Schedule) -> None:
    check(PROBLEMS[name], run(PROBLEMS[name], schedule))


@settings(deadline=None, max_examples=25)
@given(
    parts=st.lists(
        st.tuples(st.integers(0, 150), st.integers(0, 300), st.integers(0, 9)), max_size=4
    ),
    causal=st.booleans(),
    seed=st.integers(0, 9),
    num_processors=st.integers(1, 5),
)
def test_forward_is_right_for_any_ranges(
    parts: list[tuple[int, int, int]], causal: bool, seed: int, num_processors: int
) -> None:
    problem = Problem(tuple(parts), causal=causal)
    check(problem, run(problem, Schedule("shuffled", seed), num_processors))


def test_order_and_number_of_programs_do_not_change_a_bit() -> None:
    problem = PROBLEMS["tiny documents"]
    first = run(problem)
    for number, schedule in zip(GRIDS, SCHEDULES, strict=True):
        again = run(problem, schedule, number)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_tokens_outside_of_ranges_see_nothing() -> None:
    q, k, v = Problem(packed(200)).tensors()
    with emulating():
        out, lse = attention_forward(
            q, k, v, Ranges.of([3, 140], [0], [137]), implementation="gluon"
        )
        inner, _ = attention_forward(
            q[3:140], k, v, Ranges.of([0, 137], [0], [137]), implementation="gluon"
        )
    outside = torch.tensor([*range(3), *range(140, 200)])
    assert not out[outside].any() and (lse[outside] == -torch.inf).all()
    assert torch.equal(out[3:140], inner)


@pytest.mark.parametrize("gap", [0, 8, 3])
def test_strided_inputs_are_read_in_place_or_copied(gap: int) -> None:
    """A view into packed QKV with NaN between its parts; 3 elements break the copy's alignment."""
    problem = PROBLEMS["1 to 1, fp16"]
    q, k, v = problem.tensors()
    wide = torch.full((len(q), 6, problem.head_dim + gap), torch.nan, dtype=q.dtype)
    views = [wide[:, 2 * i : 2 * i + 2, : problem.head_dim] for i in range(3)]
    for view, tensor in zip(views, (q, k, v), strict=True):
        view.copy_(tensor)
    with emulating():
        out, _ = attention_forward(*views, problem.boundaries(), implementation="gluon")
    assert torch.equal(out, run(problem)[0])


def test_fp32_is_refused() -> None:
    with emulating(), pytest.raises(DtypeError, match="expected bf16 or fp16"):
        run(Problem(packed(3), dtype=torch.float32))


@given(
    lengths=st.lists(st.tuples(st.integers(0, 400), st.integers(0, 400)), max_size=6),
    before=st.integers(0, 5),
    after=st.integers(0, 5),
    causal=st.booleans(),
)
def test_tiles_hold_every_query_once_and_the_longest_come_first(
    lengths: list[tuple[int, int]], before: int, after: int, causal: bool
) -> None:
    offsets, ends = [before], []
    for num_queries, num_keys in lengths:
        offsets.append(offsets[-1] + num_queries)
        ends.append((ends[-1] if ends else 0) + num_keys)
    ranges = Ranges.of(offsets, [0, *ends[:-1]] if ends else [], ends)
    total = offsets[-1] + after
    where = (ranges.q_offsets, ranges.k_starts, ranges.k_ends)
    table = tiles(*where, num_queries=total, tile_rows=128, causal=causal).tolist()
    rows = sorted(row for first, size, *_ in table for row in range(first, first + size))
    assert rows == list(range(total))
    costs = [
        max(min(keys, diagonal + size), 0) if causal else keys
        for _, size, _, keys, diagonal, *_ in table
    ]
    assert costs == sorted(costs, reverse=True)


def test_tiles_are_made_once_and_anew_when_boundaries_change() -> None:
    ranges = Ranges.of([0, 130], [0], [130])
    where = (ranges.q_offsets, ranges.k_starts, ranges.k_ends)
    named = {"num_queries": 130, "tile_rows": 128, "causal": True}
    first = tiles(*where, **named)
    assert tiles(*where, **named) is first
    ranges.k_ends[0] = 100
    assert tiles(*where, **named)[0, 3] == 100


@contextmanager
def planted(folder: Path, old: str, new: str) -> Iterator[None]:
    """The forward kernel with one text replaced."""
    source = (registry.folder("attention") / "gluon_forward.py").read_text()
    assert source.count(old) == 1, old
    file = folder / "planted_gluon_forward.py"
    file.write_text(source.replace(old, new))
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[file.stem] = module
    spec.loader.exec_module(module)
    with pytest.MonkeyPatch.context() as patch:
        kernel = module.attention_forward_kernel
        patch.setattr(gluon_impl, "attention_forward_kernel", kernel)
        yield
    del sys.modules[file.stem]


MISTAKES = {
    "keys are not released": ("    _release(k_ring, count, STAGES)\n    new_p", "    new_p"),
    "values are released while read": (
        "    acc_MC, p_ML = warpgroup_mma_wait(0, deps=(acc_MC, p_ML))\n"
        "    _release(v_ring, count - 1, STAGES)\n",
        "    _release(v_ring, count - 1, STAGES)\n"
        "    acc_MC, p_ML = warpgroup_mma_wait(0, deps=(acc_MC, p_ML))\n",
    ),
    "scores are used in flight": (
        "s_ML = warpgroup_mma_wait(1, deps=(s_ML,))",
        "s_ML = warpgroup_mma_wait(2, deps=(s_ML,))",
    ),
    "values are not awaited": (
        "    _wait_full(v_ring, last, STAGES)\n    v = ",
        "    v = ",
    ),
    "queries are overwritten": (
        "mbarrier.wait(q_empty.index(consumer), (visits & 1) ^ 1)",
        "pass",
    ),
    "queries are waited for in the wrong phase": (
        "mbarrier.wait(q_full.index(CONSUMER), visits & 1)",
        "mbarrier.wait(q_full.index(CONSUMER), (visits & 1) ^ 1)",
    ),
    "zeros are not fenced": (
        "    fence_async_shared()\n    mbarrier.arrive(full",
        "    mbarrier.arrive(full",
    ),
    "zeros are not written": ("if num_rows < (part + 1) * _ZEROED_ROWS:", "if num_rows < 0:"),
    "one key too many": ("keys[None, :] < limits[:, None]", "keys[None, :] <= limits[:, None]"),
    "one block unmasked": ("seen_by_first // KEYS\n", "gl.cdiv(seen_by_first, KEYS)\n"),
    "one row too many": ("mask=own < num_rows", "mask=own <= num_rows"),
    "no decay": ("total * decay + gl.sum", "total + gl.sum"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_planted_mistake_is_found(tmp_path: Path, name: str) -> None:
    problem = Problem(((300, 300, 5), (130, 400, 3)), num_heads=2)
    check(problem, run(problem))
    with planted(tmp_path, *MISTAKES[name]), pytest.raises(GateError):
        for schedule in SCHEDULES[:3]:
            check(problem, run(problem, schedule))
