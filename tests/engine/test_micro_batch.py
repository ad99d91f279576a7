"""Where tokens go: context chunks cover a row once and cost every rank the same."""

from hypothesis import given
from hypothesis import strategies as st

from phi4.engine.layout import context_chunks


@given(st.integers(1, 4), st.integers(1, 5))
def test_context_chunks_cover_a_row_once(cp_size: int, unit: int) -> None:
    length = 2 * cp_size * unit
    chunks = [c for rank in range(cp_size) for c in context_chunks(length, rank, cp_size)]
    covered = sorted(position for start, end in chunks for position in range(start, end))
    assert covered == list(range(length))


@given(st.integers(2, 4))
def test_every_context_rank_has_the_same_causal_work(cp_size: int) -> None:
    length = 8 * cp_size
    work = {
        sum(p + 1 for a, b in context_chunks(length, rank, cp_size) for p in range(a, b))
        for rank in range(cp_size)
    }
    assert len(work) == 1
