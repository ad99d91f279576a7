"""Ranges of keys against the plain statement: a query sees its document up to itself."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from phi4.config import ParallelConfig
from phi4.engine.layout import Layout, context_chunks
from phi4.engine.model.document_ranges import visible_keys
from phi4.engine.model.placement import map_tensors

VARIANTS = ("all_gather", "ring")


@st.composite
def rows(draw: st.DrawFn) -> tuple[np.ndarray, int, int, int]:
    """(cu_seqlens, rows, length of a row, context ranks)."""
    cp_size, num_rows = draw(st.sampled_from([1, 2, 3, 4])), draw(st.integers(1, 3))
    length = 2 * cp_size * draw(st.integers(1, 4))
    inner = draw(st.sets(st.integers(0, num_rows * length - 1), max_size=8))
    bounds = sorted(inner | {row * length for row in range(num_rows + 1)})
    return np.array(bounds, dtype=np.int32), num_rows, length, cp_size


def layout_of(cp_rank: int, cp_size: int, variant: str) -> Layout:
    parallel = ParallelConfig(context=cp_size, context_attention=variant)
    return Layout(parallel, 0, 0, cp_rank, 0, 1, SimpleNamespace())


def tokens_of(columns: list[tuple[int, int]], num_rows: int, length: int) -> list[int]:
    """Tokens of the flattened rows in these columns, rows in order."""
    return [row * length + c for row in range(num_rows) for a, b in columns for c in range(a, b)]


def seen_by_rank(
    cu_seqlens: np.ndarray, num_rows: int, length: int, layout: Layout
) -> list[tuple[int, int]]:
    """Every (query, key) that the rank's ranges show, as tokens of the flattened rows."""
    plan = visible_keys(cu_seqlens, num_rows, length, layout)
    pairs = []
    for step, block in enumerate(plan):
        source = (layout.cp_rank - step) % layout.cp_size
        whole = len(plan) == 1
        columns = [(0, length)] if whole else context_chunks(length, source, layout.cp_size)
        keys = tokens_of(columns, num_rows, length)
        for chunk, ranges in zip(layout.context_chunks(length), block, strict=True):
            queries = tokens_of([chunk], num_rows, length)
            if ranges is None:
                continue
            ranges.validate(len(queries), len(keys))
            assert ranges.q_offsets[[0, -1]].tolist() == [0, len(queries)]
            bounds = ranges.q_offsets.tolist()
            sides = zip(bounds, bounds[1:], ranges.k_starts, ranges.k_ends, strict=False)
            for start, end, k_start, k_end in sides:
                assert end - start <= ranges.max_queries
                assert k_end - k_start <= ranges.max_keys
                for query in range(start, end):
                    last = k_end - (end - 1 - query) if step == 0 else k_end
                    pairs += [(queries[query], key) for key in keys[k_start:last]]
    return pairs


def expected_pairs(cu_seqlens: np.ndarray, queries: list[int]) -> list[tuple[int, int]]:
    starts = cu_seqlens[np.searchsorted(cu_seqlens, queries, side="right") - 1]
    return [
        (q, key) for q, start in zip(queries, starts, strict=True) for key in range(start, q + 1)
    ]


@pytest.mark.parametrize("variant", VARIANTS)
@given(rows())
def test_each_query_sees_its_document_so_far_once(variant, batch):
    cu_seqlens, num_rows, length, cp_size = batch
    for rank in range(cp_size):
        layout = layout_of(rank, cp_size, variant)
        queries = tokens_of(layout.context_chunks(length), num_rows, length)
        seen = seen_by_rank(cu_seqlens, num_rows, length, layout)
        assert sorted(seen) == expected_pairs(cu_seqlens, sorted(queries))


@given(rows(), st.sampled_from(["all_gather", "ring"]))
def test_the_host_knows_which_ranges_are_whole_documents(batch, variant):
    cu_seqlens, num_rows, length, cp_size = batch
    for rank in range(cp_size):
        layout = layout_of(rank, cp_size, variant)
        plan = visible_keys(cu_seqlens, num_rows, length, layout)
        for ranges in (ranges for block in plan for ranges in block if ranges is not None):
            # Raises where it is claimed and not so.
            ranges.validate()
            assert map_tensors(ranges, torch.clone).num_tokens == ranges.num_tokens
            if cp_size == 1:
                assert ranges.num_tokens == num_rows * length


def test_blocks_that_no_document_shares_are_left_out():
    cu_seqlens = np.array([0, 4, 8, 12, 16], dtype=np.int32)
    plan = visible_keys(cu_seqlens, 1, 16, layout_of(0, 2, "ring"))
    assert [ranges is None for ranges in plan[0]] == [False, False]
    assert plan[1] == (None, None)


def test_documents_without_keys_are_one_range():
    # The last rank's second chunk sees the first rank's keys only through the first document.
    cu_seqlens = np.array([0, 9, 10, 11, 12, 16], dtype=np.int32)
    plan = visible_keys(cu_seqlens, 1, 16, layout_of(1, 2, "ring"))
    first, second = plan[1]
    assert first.k_ends.tolist() == [4]
    assert second.q_offsets.tolist() == [0, 1, 4]
    assert (second.k_starts.tolist(), second.k_ends.tolist()) == ([0, 4], [4, 4])
