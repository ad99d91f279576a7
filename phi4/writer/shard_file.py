"""One file of records as torch's distributed checkpoints have it, hashed while it is written.

A save that waits and one that does not write by this function, so their files are the same.
"""

import hashlib
import io
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, cast

import torch

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer


@dataclass(frozen=True)
class WrittenFile:
    """A file that is on the disk.

    Attributes:
        name: of the file, without its directory.
        places: (offset, length) in bytes of every record, in the order they were given.
        num_bytes: size of the file.
        sha256: of its content.
    """

    name: str
    places: tuple[tuple[int, int], ...]
    num_bytes: int
    sha256: str


def write_shard_file(path: Path, records: Iterable[bytes | torch.Tensor]) -> WrittenFile:
    """Write records one after the other and wait until they are on the disk.

    Args:
        path: must not exist: nobody else writes there.
        records: bytes are written as they are; a tensor, on the host, in the form of `torch.save`,
            alone even where it is a view of more.

    Raises:
        OSError: names the file.
    """
    stream, places = _HashedStream(path), []
    try:
        for record in records:
            begin = stream.tell()
            if isinstance(record, torch.Tensor):
                _save_tensor(record, stream)
            else:
                stream.write(record)
            places.append((begin, stream.tell() - begin))
        stream.sync()
    except Exception as error:
        # torch's zip writer answers a short write with "unexpected pos", and drops its reason.
        cause = stream.error or (error if isinstance(error, OSError) else None)
        if cause is None:
            raise
        raise OSError(cause.errno, cause.strerror, str(path)) from None
    finally:
        stream.close()
    return WrittenFile(path.name, tuple(places), stream.tell(), stream.sha256())


def _save_tensor(tensor: torch.Tensor, stream: "_HashedStream") -> None:
    alone = tensor.detach().contiguous()
    if alone.untyped_storage().size() != alone.numel() * alone.itemsize:
        alone = alone.clone()
    torch.save(alone, cast(IO[bytes], stream))


class _HashedStream(io.RawIOBase):
    """A new file, written from begin to end; keeps the first error that writing met."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("xb", buffering=0)
        self._digest, self._num_bytes = hashlib.sha256(), 0
        self.error: OSError | None = None

    def writable(self) -> bool:
        """It is."""
        return True

    def write(self, content: "ReadableBuffer", /) -> int:
        """Write all of it."""
        view = memoryview(content).cast("B")
        rest = view
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            self.error = self.error or error
            raise
        self._digest.update(view)
        self._num_bytes += len(view)
        return len(view)

    def tell(self) -> int:
        """Bytes written."""
        return self._num_bytes

    def sync(self) -> None:
        """Wait until they are on the disk."""
        os.fsync(self._file.fileno())

    def sha256(self) -> str:
        """Of what was written."""
        return self._digest.hexdigest()

    def close(self) -> None:
        """Close the file."""
        self._file.close()
        super().close()
