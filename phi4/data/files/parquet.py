"""Read rows of parquet files a few at a time, with memory proportional to pages, not row groups.

One row group may hold an entire corpus, so parts and batches are independent of row groups. A row
that cannot be used is returned as a `RowError`.
"""

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING

from phi4.data.files.jsonl import RowError, arrow
from phi4.errors import DataError

if TYPE_CHECKING:
    from pyarrow import Array, RecordBatch, Scalar
    from pyarrow.parquet import FileMetaData, ParquetFile

_BATCH_BYTES = 4 << 20
_BATCH_ROWS = 64
"""The metadata underestimates repeated texts, which are stored in a dictionary of about a
megabyte."""
_PARTS_PER_GROUP = 16
"""Each part decodes the group from its beginning: with sixteen parts, that is about 4% of their
tokenization."""
_PAGE_BUFFER_BYTES = 1 << 20


def parquet_cuts(path: str, num_parts: int) -> list[int]:
    """Return the rows at which a file is cut, including the first and the last bound.

    Cuts follow row groups if there are enough of them; a part that begins inside a group decodes
    and drops its earlier rows.

    Args:
        path: path of the file.
        num_parts: requested number of parts; few row groups or rows give fewer, at least one.

    Raises:
        DataError: the file is not parquet.
    """
    with open_parquet(path) as file:
        bounds = _group_bounds(file.metadata)
    num_groups, num_rows = len(bounds) - 1, bounds[-1]
    if num_parts <= num_groups:
        return [bounds[num_groups * i // num_parts] for i in range(num_parts + 1)]
    num_parts = max(1, min(num_parts, num_rows, _PARTS_PER_GROUP * num_groups))
    return [num_rows * i // num_parts for i in range(num_parts + 1)]


def parquet_rows(
    path: str, begin: int, end: int, columns: Sequence[str], max_bytes: int
) -> Iterator[dict[str, object] | RowError]:
    """Read rows `begin` to `end` of a file; binary values are decoded as UTF-8.

    Args:
        path: path of the file.
        begin, end: rows from 0.
        columns: columns to read; those missing in the file are missing in the rows.
        max_bytes: a longer row is returned as an error.

    Raises:
        DataError: the file is not parquet.
        OSError, ValueError, NotImplementedError: it is damaged or cannot be decoded.
    """
    with open_parquet(path) as file:
        present = [name for name in dict.fromkeys(columns) if name in file.schema_arrow.names]
        for batch in _batches(file, begin, end, present):
            batch = _without_dictionaries(batch)
            if batch.nbytes <= max_bytes:
                yield from _rows(batch)
                continue
            for index in range(batch.num_rows):
                row = batch.slice(index, 1)
                if row.nbytes > max_bytes:
                    yield RowError(f"{row.nbytes} bytes; at most {max_bytes} are read")
                else:
                    yield from _rows(row)


def _batches(
    file: "ParquetFile", begin: int, end: int, columns: list[str]
) -> Iterator["RecordBatch"]:
    bounds = _group_bounds(file.metadata)
    for group, first in enumerate(bounds[:-1]):
        if bounds[group + 1] <= begin or first >= end:
            continue
        size = _batch_rows(file.metadata, group, columns)
        for batch in file.iter_batches(size, row_groups=[group], columns=columns):
            skipped = min(max(0, begin - first), batch.num_rows)
            taken = batch.slice(skipped, max(0, end - first - skipped))
            first += batch.num_rows
            if taken.num_rows:
                yield taken
            if first >= end:
                break


def _batch_rows(metadata: "FileMetaData", group: int, columns: list[str]) -> int:
    row_group = metadata.row_group(group)
    chunks = (row_group.column(i) for i in range(row_group.num_columns))
    num_bytes = sum(
        chunk.total_uncompressed_size
        for chunk in chunks
        if chunk.path_in_schema.partition(".")[0] in columns
    )
    return min(max(1, _BATCH_BYTES * row_group.num_rows // max(1, num_bytes)), _BATCH_ROWS)


def _group_bounds(metadata: "FileMetaData") -> list[int]:
    """Return the first row of each row group, and the number of rows."""
    groups = range(metadata.num_row_groups)
    return list(accumulate((metadata.row_group(i).num_rows for i in groups), initial=0))


def _without_dictionaries(batch: "RecordBatch") -> "RecordBatch":
    """Return the same rows with values instead of indices, so that sizes are those of the rows."""
    if not any(hasattr(kind, "index_type") for kind in batch.schema.types):
        return batch
    columns = [
        column.dictionary_decode() if hasattr(column.type, "index_type") else column
        for column in batch.columns
    ]
    return type(batch).from_arrays(columns, names=batch.schema.names)


def _rows(batch: "RecordBatch") -> Iterator[dict[str, object] | RowError]:
    columns = {name: _values(batch.column(i)) for i, name in enumerate(batch.schema.names)}
    for index in range(batch.num_rows):
        row = {name: values[index] for name, values in columns.items()}
        error = next((value for value in row.values() if isinstance(value, RowError)), None)
        yield row if error is None else error


def _values(column: "Array") -> list[object]:
    try:
        values = column.to_pylist()
    except UnicodeDecodeError:
        values = [_value(scalar) for scalar in column]
    return [_decoded(value) if isinstance(value, bytes) else value for value in values]


def _value(scalar: "Scalar") -> object:
    try:
        return scalar.as_py()
    except UnicodeDecodeError as error:
        return _not_utf8(error)


def _decoded(value: bytes) -> str | RowError:
    try:
        return value.decode()
    except UnicodeDecodeError as error:
        return _not_utf8(error)


def _not_utf8(error: UnicodeDecodeError) -> RowError:
    return RowError(f"invalid UTF-8 at byte {error.start}")


def open_parquet(path: str) -> "ParquetFile":
    """Open a file for reading by pages instead of row groups.

    Raises:
        DataError: it is not parquet.
        PlatformError: pyarrow is missing.
    """
    arrow(path)
    from pyarrow.parquet import ParquetFile

    try:
        # With a buffer, pages are read on demand, not an entire column of a row group at once; the
        # default would prefetch the row group anyway.
        return ParquetFile(path, buffer_size=_PAGE_BUFFER_BYTES, pre_buffer=False)
    except (OSError, ValueError, NotImplementedError) as error:  # pyarrow's errors
        raise DataError(f"{path} is not a parquet file ({error}); check the file") from None
