import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from phi4.data.stream.batch import build_batch

EOD = 9


def batch_of(tokens: list[list[int]], **options):
    rows = np.array(tokens)
    return build_batch(rows, rows, np.ones(rows.shape), eod_id=EOD, **options)


def every(step: int, num_rows: int, num_tokens: int) -> np.ndarray:
    starts = np.zeros((num_rows, num_tokens), dtype=bool)
    starts[:, ::step] = True
    return starts


def test_documents_inside_rows_and_row_starts_are_boundaries() -> None:
    batch = batch_of([[1, 2, EOD, 3, 4, EOD], [5, EOD, EOD, 6, 7, 8]])
    assert batch.cu_seqlens.tolist() == [0, 3, 6, 8, 9, 12]
    assert batch.positions.tolist() == [[0, 1, 2, 0, 1, 2], [0, 1, 0, 0, 1, 2]]
    assert batch.tokens.dtype == batch.labels.dtype == batch.positions.dtype == np.int64
    assert batch.loss_mask.dtype == np.float32 and batch.cu_seqlens.dtype == np.int32


def test_without_document_mask_only_rows_are_boundaries() -> None:
    batch = batch_of([[1, EOD, 2, 3], [4, 5, 6, EOD]], document_mask=False, starts=every(2, 2, 4))
    assert batch.cu_seqlens.tolist() == [0, 4, 8]
    assert batch.positions.tolist() == [[0, 1, 2, 3]] * 2


def test_joints_of_units_are_boundaries() -> None:
    batch = batch_of([[1, 2, 3, 4], [5, 6, 7, EOD]], starts=every(2, 2, 4))
    assert batch.cu_seqlens.tolist() == [0, 2, 4, 6, 8]


@given(data=st.data(), rows=st.integers(1, 4), units=st.integers(1, 3), unit=st.integers(1, 5))
def test_boundaries_follow_the_definition(
    data: st.DataObject, rows: int, units: int, unit: int
) -> None:
    width = units * unit
    row = st.lists(st.sampled_from([1, 2, EOD]), min_size=width, max_size=width)
    tokens = data.draw(st.lists(row, min_size=rows, max_size=rows))
    batch = batch_of(tokens, starts=every(unit, rows, width))
    flat = [token for row in tokens for token in row]
    starts = [i for i in range(len(flat)) if i % unit == 0 or flat[i - 1] == EOD]
    assert batch.cu_seqlens.tolist() == [*starts, len(flat)]
    expected = [i - max(start for start in starts if start <= i) for i in range(len(flat))]
    assert batch.positions.reshape(-1).tolist() == expected
