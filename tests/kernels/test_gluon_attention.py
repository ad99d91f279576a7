"""Hopper attention, emulated: numbers by the error rule, a protocol that holds in any order."""

import importlib
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
from phi4_kernels.attention import (
    Ranges,
    attention_backward,
    attention_forward,
    gluon_impl,
    reference,
)
from phi4_kernels.attention.gluon_tiles import tiles
from phi4_kernels.errors import DtypeError, GateError
from phi4_kernels.testing import error_rule, gates, numerics
from phi4_kernels.testing.gluon_emulator import emulating
from phi4_kernels.testing.gluon_machine import Schedule
from phi4_kernels.testing.poison import poisoned
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

    def dout(self) -> Tensor:
        """Gradient of the output; 0 where a query sees one key, since the rest is cancellation."""
        shape, generator = self.tensors()[0].shape, torch.Generator().manual_seed(99)
        dout = torch.randn(shape, generator=generator).to(self.dtype)
        counts = [
            num_keys - self.causal * (num_queries - 1 - query)
            for num_queries, num_keys, _ in self.ranges
            for query in range(num_queries)
        ]
        dout[torch.tensor(counts, dtype=torch.int64) == 1] = 0.0
        return dout


def packed(*lengths: int) -> tuple[tuple[int, int, int], ...]:
    return tuple((length, length, 0) for length in lengths)


Results = dict[str, Tensor]


def run(problem: Problem, schedule: Schedule | None = None, num_processors: int = 2) -> Results:
    """Output, lse and all gradients; these from the reference's output, so that only backward's own
    errors are in them."""
    ranges, tensors = problem.boundaries(), problem.tensors()
    given = defined(problem, problem.dtype)
    named = {"causal": problem.causal, "implementation": "gluon"}
    with emulating(schedule, num_processors), poisoned() as guard:
        out, lse = attention_forward(*tensors, ranges, **named)
        gradients = attention_backward(
            problem.dout(), *tensors, given["out"], given["lse"], ranges, **named
        )
    guard.verify()
    return {"out": out, "lse": lse, **dict(zip(("dq", "dk", "dv"), gradients, strict=True))}


def defined(problem: Problem, dtype: torch.dtype) -> Results:
    """What the reference gives for the inputs as `dtype`; keys that nobody has written are zeros,
    which no query sees either."""
    ranges, constants = problem.boundaries(), {"causal": problem.causal}
    constants["scale"] = problem.head_dim**-0.5
    q, k, v = (x.nan_to_num(nan=0.0).to(dtype) for x in problem.tensors())
    out, lse = reference.attention_forward(q, k, v, ranges, **constants)
    dout = problem.dout().to(dtype)
    gradients = reference.attention_backward(dout, q, k, v, out, lse, ranges, **constants)
    return {"out": out, "lse": lse, **dict(zip(("dq", "dk", "dv"), gradients, strict=True))}


def check(problem: Problem, ours: Results) -> None:
    """Outputs and gradients by the error rule; lse where it is finite."""
    eager, truth = defined(problem, problem.dtype), defined(problem, torch.float64)
    seen = truth["lse"].isfinite()
    if not torch.equal(ours["lse"].isfinite(), seen) or ours["out"][~seen].any():
        raise GateError("a query without keys got a result, or one with keys got none")
    for results in (ours, eager, truth):
        results["lse"] = results["lse"][seen].unsqueeze(1)
    for name, exact in truth.items():
        error_rule.check(name, ours[name], eager[name], exact)


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
def test_outputs_and_gradients_obey_the_error_rule(name: str, schedule: Schedule) -> None:
    check(PROBLEMS[name], run(PROBLEMS[name], schedule))


@settings(deadline=None, max_examples=20)
@given(
    parts=st.lists(
        st.tuples(st.integers(0, 140), st.integers(0, 200), st.integers(0, 9)), max_size=3
    ),
    causal=st.booleans(),
    seed=st.integers(0, 9),
    num_processors=st.integers(1, 5),
)
def test_any_ranges_are_right(
    parts: list[tuple[int, int, int]], causal: bool, seed: int, num_processors: int
) -> None:
    problem = Problem(tuple(parts), causal=causal)
    check(problem, run(problem, Schedule("shuffled", seed), num_processors))


def test_order_and_number_of_programs_do_not_change_a_bit() -> None:
    problem = PROBLEMS["tiny documents"]
    first = run(problem)
    for number, schedule in zip(GRIDS, SCHEDULES, strict=True):
        again = run(problem, schedule, number)
        numerics.expect_same_bits(f"{number} programs, {schedule}", first, again)


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
    assert torch.equal(out, run(problem)["out"])


def test_fp32_is_refused() -> None:
    with emulating(), pytest.raises(DtypeError, match="expected bf16 or fp16"):
        run(Problem(packed(3), dtype=torch.float32))


@given(
    lengths=st.lists(st.tuples(st.integers(0, 400), st.integers(0, 400)), max_size=6),
    before=st.integers(0, 5),
    after=st.integers(0, 5),
    causal=st.booleans(),
    of_keys=st.booleans(),
)
def test_tiles_hold_every_token_once_and_the_longest_come_first(
    lengths: list[tuple[int, int]], before: int, after: int, causal: bool, of_keys: bool
) -> None:
    offsets, ends = [before], [0]
    for num_queries, num_keys in lengths:
        offsets.append(offsets[-1] + num_queries)
        ends.append(ends[-1] + num_keys)
    ranges = Ranges.of(offsets, ends[:-1], ends[1:])
    total = ends[-1] if of_keys else offsets[-1] + after
    where = (ranges.q_offsets, ranges.k_starts, ranges.k_ends)
    named = {"num_tokens": total, "tile_rows": 128, "causal": causal, "of_keys": of_keys}
    table = tiles(*where, **named).tolist()
    rows = sorted(row for first, size, *_ in table for row in range(first, first + size))
    assert rows == list(range(total))
    costs = [_pairs(*columns[1:5:2], columns[4], causal, of_keys) for columns in table]
    assert costs == sorted(costs, reverse=True)


def _pairs(size: int, others: int, offset: int, causal: bool, of_keys: bool) -> int:
    """Tokens of the other side that a tile meets."""
    if not causal:
        return others
    return others - max(offset, 0) if of_keys else min(others, offset + size)


def test_tiles_are_made_once_and_anew_when_boundaries_change() -> None:
    ranges = Ranges.of([0, 130], [0], [130])
    where = (ranges.q_offsets, ranges.k_starts, ranges.k_ends)
    named = {"num_tokens": 130, "tile_rows": 128, "causal": True}
    first = tiles(*where, **named)
    assert tiles(*where, **named) is first
    ranges.k_ends[0] = 100
    assert tiles(*where, **named)[0, 3] == 100


KERNELS = ("attention_forward_kernel", "attention_dq_kernel", "attention_dkdv_kernel")
FILES = ("gluon_rings", "gluon_forward", "gluon_dq", "gluon_dkdv")


@contextmanager
def planted(folder: Path, file: str, old: str, new: str) -> Iterator[None]:
    """Copies of all kernels, one text of one file replaced."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        for name in FILES:
            source = (registry.folder("attention") / f"{name}.py").read_text()
            if name == file:
                assert source.count(old) == 1, old
                source = source.replace(old, new)
            for other in FILES:
                source = source.replace(f"phi4_kernels.attention.{other} ", f"planted_{other} ")
            (folder / f"planted_{name}.py").write_text(source)
            patch.delitem(sys.modules, f"planted_{name}", raising=False)
        importlib.invalidate_caches()
        for name, kernel in zip(FILES[1:], KERNELS, strict=True):
            module = importlib.import_module(f"planted_{name}")
            patch.setattr(gluon_impl, kernel, getattr(module, kernel))
        yield


PLANTED = Problem(((300, 300, 5), (40, 0, 0), (130, 520, 3)))
MISTAKES = {
    "keys are not released": (
        "gluon_forward",
        "    release(k_ring, count, STAGES)\n    new_p",
        "    new_p",
    ),
    "values are released while read": (
        "gluon_forward",
        "    acc_MC, p_ML = warpgroup_mma_wait(0, deps=(acc_MC, p_ML))\n"
        "    release(v_ring, count - 1, STAGES)\n",
        "    release(v_ring, count - 1, STAGES)\n"
        "    acc_MC, p_ML = warpgroup_mma_wait(0, deps=(acc_MC, p_ML))\n",
    ),
    "scores are used in flight": (
        "gluon_forward",
        "s_ML = warpgroup_mma_wait(1, deps=(s_ML,))",
        "s_ML = warpgroup_mma_wait(2, deps=(s_ML,))",
    ),
    "values are not awaited": (
        "gluon_forward",
        "    wait_full(v_ring, last, STAGES)\n    v = ",
        "    v = ",
    ),
    "queries are released early": (
        "gluon_forward",
        "q = block_of(q_ring, mine, CONSUMERS)\n",
        "q = block_of(q_ring, mine, CONSUMERS)\n                release(q_ring, mine, CONSUMERS)\n",
    ),
    "turns are not passed": ("gluon_forward", "turns.index(1 - CONSUMER)", "turns.index(CONSUMER)"),
    "one key too many": (
        "gluon_forward",
        "keys[None, :] < limits[:, None]",
        "keys[None, :] <= limits[:, None]",
    ),
    "one row too many": ("gluon_forward", "mask=own < num_rows", "mask=own <= num_rows"),
    "no decay": ("gluon_forward", "total * decay + gl.sum", "total + gl.sum"),
    "slots are waited for in the wrong phase": (
        "gluon_rings",
        "mbarrier.wait(ring[1].index(count % STAGES), count // STAGES & 1)",
        "mbarrier.wait(ring[1].index(count % STAGES), (count // STAGES & 1) ^ 1)",
    ),
    "slots are filled while read": (
        "gluon_rings",
        "    mbarrier.wait(empty.index(slot), (count // STAGES & 1) ^ 1)\n    mbarrier.expect(full",
        "    mbarrier.expect(full",
    ),
    "zeros are not fenced": (
        "gluon_rings",
        "    fence_async_shared()\n    mbarrier.arrive(full",
        "    mbarrier.arrive(full",
    ),
    "zeros are not written": (
        "gluon_rings",
        "if num_rows < (part + 1) * _ZEROED_ROWS:",
        "if False:",
    ),
    "one block unmasked": (
        "gluon_rings",
        "seen_by_first // KEYS\n",
        "gl.cdiv(seen_by_first, KEYS)\n",
    ),
    "keys of dq are released while read": (
        "gluon_dq",
        "    dq_MC, ds_ML = warpgroup_mma_wait(0, deps=(dq_MC, ds_ML))\n"
        "    release(k_ring, count, STAGES)\n",
        "    release(k_ring, count, STAGES)\n"
        "    dq_MC, ds_ML = warpgroup_mma_wait(0, deps=(dq_MC, ds_ML))\n",
    ),
    "delta is left out": ("gluon_dq", "(dp_ML - delta[:, None])", "dp_ML"),
    "delta of another head": ("gluon_dq", "head.to(gl.int64) * row_stride", "0 * row_stride"),
    "rows are not awaited": ("gluon_dkdv", "    wait_full(row_ring, count, STAGES)\n", ""),
    "rows expect one load": (
        "gluon_dkdv",
        "2 * lse2_desc.block_type.nbytes",
        "lse2_desc.block_type.nbytes",
    ),
    "rows are not cut at the range": (
        "gluon_dkdv",
        "queries < left, lse2",
        "queries < QUERIES, lse2",
    ),
    "keys see one query too many": (
        "gluon_dkdv",
        "own[:, None] <= queries",
        "own[:, None] - 1 <= queries",
    ),
    "one head of the group": ("gluon_dkdv", "for _ in range(group):", "for _ in range(group - 1):"),
    "probabilities are used in flight": (
        "gluon_dkdv",
        "dp_LM = warpgroup_mma_wait(1, deps=(dp_LM,))",
        "dp_LM = warpgroup_mma_wait(2, deps=(dp_LM,))",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_planted_mistake_is_found(tmp_path: Path, name: str) -> None:
    with planted(tmp_path, *MISTAKES[name]), pytest.raises(GateError):
        for schedule in SCHEDULES[:3]:
            check(PLANTED, run(PLANTED, schedule))


def test_copies_without_a_mistake_are_green(tmp_path: Path) -> None:
    with planted(tmp_path, "", "", ""):
        check(PLANTED, run(PLANTED))


GATES = [
    check
    for entry in registry.entries().values()
    if entry.op == "attention"
    for check in gates.names(entry, "gluon")
]


@pytest.mark.parametrize(("entry", "case", "dtype"), GATES)
def test_registered_cases_obey_the_error_rule(entry: str, case: str, dtype: str) -> None:
    with emulating(Schedule("shuffled")):
        assert gates.check_numbers(entry, case, dtype, "gluon")
