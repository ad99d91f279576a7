"""Write one file of records in torch's distributed checkpoint format, hashed during the write.

Synchronous and asynchronous saves both use this function, so their files are identical.
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
    """A file that has been written durably.

    Attributes:
        name: name of the file, without its directory.
        places: (offset, length) in bytes of every record, in the given order.
        num_bytes: size of the file.
        sha256: sha256 of its content.
    """

    name: str
    places: tuple[tuple[int, int], ...]
    num_bytes: int
    sha256: str


def write_shard_file(path: Path, records: Iterable[bytes | torch.Tensor]) -> WrittenFile:
    """Write records one after the other and fsync the file.

    Args:
        path: must not exist, and no other process may write there.
        records: bytes are written unchanged; a tensor, on the host, in the format of `torch.save`,
            without the rest of its storage if it is a view.

    Raises:
        OSError: with the file's name.
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
    """A new file, written sequentially; keeps the first error of a write."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("xb", buffering=0)
        self._digest, self._num_bytes = hashlib.sha256(), 0
        self.error: OSError | None = None

    def writable(self) -> bool:
        """Return True."""
        return True

    def write(self, content: "ReadableBuffer", /) -> int:
        """Write all of the data."""
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
        """Return the number of bytes written."""
        return self._num_bytes

    def sync(self) -> None:
        """Fsync the file."""
        os.fsync(self._file.fileno())

    def sha256(self) -> str:
        """Return the hash of the written data."""
        return self._digest.hexdigest()

    def close(self) -> None:
        """Close the file."""
        self._file.close()
        super().close()
