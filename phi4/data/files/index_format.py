"""Layout of Megatron's `.idx`: a header, lengths and pointers of sequences, document bounds."""

import struct

import numpy as np

from phi4.errors import DataError

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")  # Magic, version, dtype code, sequences, document bounds.
_DTYPES: dict[int, np.dtype] = {4: np.dtype("<i4"), 8: np.dtype("<u2")}
_INT32_CODE = 4


def index_bytes(lengths: np.ndarray, sequences_per_document: int = 1) -> bytes:
    """Return the `.idx` of int32 documents that have the same number of sequences each.

    Args:
        lengths: [num_sequences], int32, tokens per sequence.
        sequences_per_document: divides num_sequences.
    """
    num_documents = lengths.size // sequences_per_document
    ends = 4 * np.cumsum(lengths, dtype=np.int64)
    header = HEADER.pack(MAGIC, 1, _INT32_CODE, lengths.size, num_documents + 1)
    pointers = ends - 4 * lengths.astype(np.int64)
    bounds = np.arange(num_documents + 1, dtype=np.int64) * sequences_per_document
    columns = (lengths.astype("<i4"), pointers.astype("<i8"), bounds.astype("<i8"))
    return header + b"".join(column.tobytes() for column in columns)


def read_header(header: bytes, path: str) -> tuple[np.dtype, int, int]:
    """Read type of the ids, number of sequences and number of document bounds.

    Raises:
        DataError: the bytes are not a supported header.
    """
    if len(header) < HEADER.size or not header.startswith(MAGIC):
        raise DataError(f"{path} is not a Megatron index; write one with `phi4 data tokenize`")
    _, version, code, num_sequences, num_bounds = HEADER.unpack(header)
    if version != 1 or code not in _DTYPES:
        raise DataError(
            f"{path} has version {version} and dtype code {code}; expected version 1 with int32 "
            f"(4) or uint16 (8) ids; tokenize again"
        )
    return _DTYPES[code], num_sequences, num_bounds


def check_index_size(found: int, expected: int, num_sequences: int, path: str) -> None:
    """Check the size of an index against its header.

    Raises:
        DataError: they differ.
    """
    # Multimodal files carry one more byte per sequence.
    if found not in (expected, expected + num_sequences):
        raise DataError(
            f"{path} has {found} bytes, but its header describes {expected}; the index is "
            f"truncated or damaged: copy it again or tokenize again"
        )
