"""Hopper attention, emulated: numbers by the error rule, a protocol that holds in any order."""

from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from phi4_kernels import registry
from phi4_kernels.attention import Ranges, attention_forward, once
from phi4_kernels.attention.gluon_tiles import ROW_ALIGNMENT, places_of_rows, tiles
from phi4_kernels.errors import DtypeError
from phi4_kernels.testing import gates, numerics
from phi4_kernels.testing.gluon import emulator
from phi4_kernels.testing.gluon.emulator import emulating
from phi4_kernels.testing.gluon.machine import Schedule

from tests.kernels import attention_checks
from tests.kernels.gluon_problems import PROBLEMS, SCHEDULES, Problem, check, packed, run

GRIDS = [1, 7, 66, 132]


# The order of programs changes no bit, as another test shows; `make test-all` has both orders.
ORDERS = [pytest.param(SCHEDULES[1], marks=pytest.mark.slow), SCHEDULES[2]]


@pytest.mark.parametrize("schedule", ORDERS, ids=str)
@pytest.mark.parametrize("name", PROBLEMS)
def test_outputs_and_gradients_obey_the_error_rule(name: str, schedule: Schedule) -> None:
    check(PROBLEMS[name], run(PROBLEMS[name], schedule))


@settings(deadline=None, max_examples=10)
@given(
    parts=st.lists(
        st.tuples(st.integers(0, 140), st.integers(0, 200), st.integers(0, 9)), max_size=3
    ),
    causal=st.booleans(),
    seed=st.integers(0, 9),
    num_processors=st.integers(1, 5),
)
@example(parts=[(0, 0, 0), (0, 0, 0), (118, 1, 0)], causal=False, seed=0, num_processors=1)
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


@pytest.mark.parametrize(("sm_margin", "programs"), [(2, 3), (5, 1), (99, 1)])
def test_a_margin_leaves_processors_free_and_changes_no_bit(
    monkeypatch: pytest.MonkeyPatch, sm_margin: int, programs: int
) -> None:
    problem, grids = PROBLEMS["4 to 2"], []
    first = run(problem, num_processors=5)
    launched = emulator._run

    def recorded(*args: Any, grid: tuple[int], **options: Any) -> None:
        grids.append(grid)
        launched(*args, grid=grid, **options)

    monkeypatch.setattr(emulator, "_run", recorded)
    again = run(problem, num_processors=5, sm_margin=sm_margin)
    numerics.expect_same_bits(f"a margin of {sm_margin}", first, again)
    assert grids == [(min(programs, items),) for items in (4, 4, 2)]


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


def test_what_is_not_finite_stays_in_its_document() -> None:
    with emulating():
        attention_checks.what_is_not_finite_stays_in_its_document("gluon")


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


@given(
    lengths=st.lists(st.integers(0, 300), min_size=1, max_size=6),
    before=st.integers(0, 5),
    after=st.integers(0, 5),
)
def test_rows_of_ranges_start_aligned_and_lie_apart(
    lengths: list[int], before: int, after: int
) -> None:
    ends = torch.tensor([before, *lengths]).cumsum(0).tolist()
    starts = ends[:-1]
    ranges = Ranges.of(ends, starts, ends[1:])
    total = ends[-1] + after
    named = {"num_tokens": total, "tile_rows": 128, "causal": True}
    of_queries = tiles(*boundaries(ranges), **named).tolist()
    of_keys = tiles(*boundaries(ranges), **named, of_keys=True).tolist()
    first_places = [columns[2] + columns[5] for columns in of_keys if columns[1]]
    assert not any(place % ROW_ALIGNMENT for place in first_places)
    seen = [columns for columns in of_queries if columns[1] and columns[3]]
    places = sorted(row + c[5] for c in seen for row in range(c[0], c[0] + c[1]))
    assert len(set(places)) == len(places) == sum(lengths)
    assert set(places) <= set(range(places_of_rows(total, len(lengths))))
    assert set(first_places) <= set(places)


def _pairs(size: int, others: int, offset: int, causal: bool, of_keys: bool) -> int:
    """Tokens of the other side that a tile meets."""
    if not causal:
        return others
    return others - max(offset, 0) if of_keys else min(others, offset + size)


def boundaries(ranges: Ranges) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return ranges.q_offsets, ranges.k_starts, ranges.k_ends


TABLE = {"num_tokens": 130, "tile_rows": 128, "causal": True}


def test_tiles_are_made_once_and_anew_when_boundaries_change() -> None:
    ranges = Ranges.of([0, 130], [0], [130])
    first = tiles(*boundaries(ranges), **TABLE)
    assert tiles(*boundaries(ranges), **TABLE) is first
    ranges.k_ends[0] = 100
    assert tiles(*boundaries(ranges), **TABLE)[0, 3] == 100


def test_a_capture_neither_uses_nor_leaves_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """A replay must make the tiles of its own boundaries."""
    ranges = Ranges.of([0, 130], [0], [130])
    first = tiles(*boundaries(ranges), **TABLE)
    with monkeypatch.context() as patch:
        patch.setattr(once, "_is_capturing", lambda tensor: True)
        captured = tiles(*boundaries(ranges), **TABLE)
    assert captured is not first and tiles(*boundaries(ranges), **TABLE) is first


def test_a_new_ranges_sees_boundaries_that_were_overwritten_silently() -> None:
    """As by the replay of a graph: no version counts the write."""
    q, k, v = Problem(packed(6)).tensors()
    offsets = torch.tensor([0, 2, 6], dtype=torch.int32)
    with emulating():
        attention_forward(q, k, v, Ranges.packed(offsets, 6), implementation="gluon")
        offsets.data[1] = 5
        again = Ranges.packed(offsets, 6)
        out, _ = attention_forward(q, k, v, again, implementation="gluon")
        fresh = Ranges.packed(offsets.clone(), 6)
        expected, _ = attention_forward(q, k, v, fresh, implementation="gluon")
    assert torch.equal(out, expected)


# fp16 goes the way of bf16 through the kernels; `make test-all` runs it too.
GATES = [
    pytest.param(*check, marks=pytest.mark.slow if check[-1] == "fp16" else ())
    for entry in registry.entries().values()
    if entry.op == "attention"
    for check in gates.names(entry, "gluon")
]


@pytest.mark.parametrize(("entry", "case", "dtype"), GATES)
def test_registered_cases_obey_the_error_rule(entry: str, case: str, dtype: str) -> None:
    with emulating(Schedule("shuffled")):
        assert gates.check_numbers(entry, case, dtype, "gluon")
