"""Parquet: any row group size in little memory, any cut, and bad rows that cost only themselves."""

from itertools import pairwise
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from phi4.data.files import input_rows, parquet
from phi4.data.files.input_rows import list_parts
from phi4.data.files.inputs import find_inputs
from phi4.data.files.parquet import parquet_cuts, parquet_rows
from phi4.data.tokenize.documents import read_rows

TURNS = [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]


def found(path: Path) -> list[tuple[object, str]]:
    parts = list_parts(find_inputs([path]).files)
    return [(row.content, row.reason) for part in parts for row in read_rows(part)]


def write(path: Path, **columns: pa.Array | list) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


@settings(
    max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    num_rows=st.integers(0, 20),
    group_rows=st.integers(1, 25),
    num_parts=st.integers(1, 12),
    batch_rows=st.integers(1, 7),
)
def test_every_row_is_in_one_part(
    tmp_path: Path, num_rows: int, group_rows: int, num_parts: int, batch_rows: int
) -> None:
    path = tmp_path / "x.parquet"
    texts = [f"row {i}" for i in range(num_rows)]
    table = pa.table({"text": pa.array(texts, pa.string())})
    pq.write_table(table, path, row_group_size=group_rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parquet, "_BATCH_ROWS", batch_rows)
        cuts = parquet_cuts(str(path), num_parts)
        rows = [
            row["text"]
            for begin, end in pairwise(cuts)
            for row in parquet_rows(str(path), begin, end, ["text"], 100)
        ]
    assert rows == texts
    assert len(cuts) <= 1 + num_parts


def test_one_row_group_makes_several_parts_but_not_any_number(tmp_path: Path) -> None:
    path = str(write(tmp_path / "x.parquet", text=["x"] * 100))
    assert [parquet_cuts(path, count) for count in (1, 2)] == [[0, 100], [0, 50, 100]]
    assert len(parquet_cuts(path, 99)) == 17


def test_batches_are_bounded_by_bytes(tmp_path: Path) -> None:
    """Equal rows, which the file holds once, as well as different ones."""
    for name, texts in {
        "equal": ["x" * 200_000] * 200,
        "different": [chr(65 + i) * 500_000 for i in range(50)],
    }.items():
        path = tmp_path / f"{name}.parquet"
        # Pages of four rows: no reader holds less than a page.
        options = {"use_dictionary": name == "equal", "write_batch_size": 4}
        pq.write_table(pa.table({"text": texts}), path, **options)
        before = pa.total_allocated_bytes()
        rows, most = 0, 0
        for _ in parquet_rows(str(path), 0, len(texts), ["text"], 1 << 20):
            rows, most = rows + 1, max(most, pa.total_allocated_bytes() - before)
        assert rows == len(texts)
        assert most < 16 << 20, name


def test_a_row_over_the_limit_is_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(input_rows, "MAX_ROW_BYTES", 1000)
    path = write(tmp_path / "x.parquet", text=["fine", "a" * 5000, "too"])
    (first, _), (second, reason), (third, _) = found(path)
    assert (first, second, third) == ("fine", None, "too")
    assert "at most 1000 are read" in reason


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.binary(), pa.large_binary()])
def test_invalid_utf8_costs_its_row_only(tmp_path: Path, kind: pa.DataType) -> None:
    raw = pa.array([b"good", b"b\xffd", b"fine", None], pa.binary())
    if kind in (pa.large_string(), pa.large_binary()):
        raw = raw.cast(pa.large_binary())
    column = pa.Array.from_buffers(kind, 4, raw.buffers())
    rows = found(write(tmp_path / "x.parquet", text=column))
    assert [content for content, _ in rows] == ["good", None, "fine", None]
    assert rows[1][1] == "invalid UTF-8 at byte 1"
    assert rows[3][1] == "expected a string under 'text', got null"


def test_dictionary_columns_and_conversations(tmp_path: Path) -> None:
    category = pa.array(["a", "b", "a"]).dictionary_encode()
    assert [c for c, _ in found(write(tmp_path / "c.parquet", text=category))] == ["a", "b", "a"]
    path = write(tmp_path / "m.parquet", text=[None, "x"], messages=[TURNS, None])
    (chat, _), (text, _) = found(path)
    assert [message.content for message in chat.messages] == ["u", "a"]
    assert text == "x"


def test_columns_that_are_missing(tmp_path: Path) -> None:
    rows = found(write(tmp_path / "x.parquet", other=[1, 2]))
    assert rows == [(None, "expected a string under 'text', got nothing")] * 2
