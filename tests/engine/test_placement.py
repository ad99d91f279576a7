"""Where tokens go: context chunks cover a row once, segments are the documents."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from phi4.engine.layout import context_chunks
from phi4.engine.placement import attention_segments


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


@given(st.data())
def test_segments_show_each_query_its_document_so_far(data: st.DataObject) -> None:
    cp_size, num_rows = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    length = 2 * cp_size * data.draw(st.integers(1, 4))
    inner = (
        data.draw(st.sets(st.integers(1, num_rows * length - 1), max_size=6))
        if (num_rows * length > 1)
        else set()
    )
    bounds = sorted(inner | {row * length for row in range(num_rows + 1)})
    cu_seqlens = np.array(bounds, dtype=np.int32)
    for rank in range(cp_size):
        chunks = context_chunks(length, rank, cp_size)
        positions = [
            row * length + p for row in range(num_rows) for a, b in chunks for p in range(a, b)
        ]
        segments = attention_segments(cu_seqlens, num_rows, length, chunks)
        assert [s.q_start for s in segments] == [0, *(s.q_end for s in segments[:-1])]
        seen = {}
        for segment in segments:
            for query in range(segment.q_start, segment.q_end):
                # The last query sees every key, the one before it one less.
                last = segment.k_end - (segment.q_end - 1 - query)
                seen[positions[query]] = (segment.k_start, last)
        for token in positions:
            document = max(b for b in bounds if b <= token)
            assert seen[token] == (document, token + 1)
