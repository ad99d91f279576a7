from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from phi4.data.stream.packing import best_fit

lengths_strategy = st.lists(st.integers(1, 12), max_size=60)


def packed(lengths: list[int], capacity: int) -> list[list[int]]:
    order, starts = best_fit(np.array(lengths, dtype=np.int64), capacity)
    return [order[a:b].tolist() for a, b in pairwise(starts)]


@given(lengths=lengths_strategy, capacity=st.integers(12, 30))
def test_every_piece_is_in_one_row_that_holds_it(lengths: list[int], capacity: int) -> None:
    rows = packed(lengths, capacity)
    assert sorted(piece for row in rows for piece in row) == list(range(len(lengths)))
    sums = [sum(lengths[piece] for piece in row) for row in rows]
    assert all(0 < total <= capacity for total in sums)
    # Two rows that fit into one would have been one.
    assert all(a + b > capacity for i, a in enumerate(sums) for b in sums[:i])


@given(lengths=lengths_strategy)
def test_it_is_best_fit_decreasing(lengths: list[int]) -> None:
    room: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [left for left in room if left >= length]
        if fitting:
            room[room.index(min(fitting))] -= length
        else:
            room.append(12 - length)
    rows = packed(lengths, 12)
    assert sorted(room) == sorted(12 - sum(lengths[piece] for piece in row) for row in rows)


@pytest.mark.parametrize(("lengths", "rows"), [([7, 3, 5, 5], 2), ([12] * 3, 3), ([], 0)])
def test_known_packings(lengths: list[int], rows: int) -> None:
    assert len(packed(lengths, 12 if 12 in lengths else 10)) == rows
