"""Write files atomically: a file name refers only to complete content.

Content is written under a temporary name and renamed once it is durable. A full disk raises an
error with the file's name and size; no temporary file is left behind, except that of a killed
process, which the next writer of the same name removes.
"""

import errno
import fcntl
import hashlib
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from glob import escape, glob
from pathlib import Path
from typing import IO

from phi4.errors import DataError, DiskFullError, Phi4Error

_BLOCK_BYTES = 1 << 20
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_TEMPORARY = ".partial-"


def write_atomically(
    path: str | Path, content: bytes | memoryview, *, sync_name: bool = True
) -> None:
    """Write a file atomically.

    Args:
        path: replaced if it exists.
        content: content of the file, durable when this returns.
        sync_name: whether to make its name durable too; the next synced name in the directory
            includes it.

    Raises:
        DiskFullError: the content does not fit on the disk.
    """
    name = _temporary(path)
    try:
        with _filling(path, len(content)), open(name, "wb") as stream:
            stream.write(content)
            _sync_and_close(stream)
        os.replace(name, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(name)
        raise
    if not sync_name:
        return
    directory = os.open(Path(path).parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


class HashedFile:
    """A large file under a temporary name, locked, and the sha256 of its content."""

    def __init__(self, path: str) -> None:
        """Create the file.

        Raises:
            DataError: another process is writing it.
        """
        _remove_leftovers(path)
        self._path = path
        self._stream = open(_temporary(path), "wb", buffering=_BLOCK_BYTES)  # noqa: SIM115
        with suppress(OSError):  # Some file systems have no locks.
            fcntl.flock(self._stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        self._digest = hashlib.sha256()

    def write(self, content: bytes | memoryview) -> None:
        with _filling(self._path, len(content)):
            self._stream.write(content)
        self._digest.update(content)

    def finish(self) -> str:
        """Make the content durable and return the checksum."""
        with _filling(self._path, _BLOCK_BYTES):
            _sync_and_close(self._stream)
        return self._digest.hexdigest()

    def publish(self) -> None:
        """Rename the file to its final name."""
        os.replace(self._stream.name, self._path)

    def discard(self) -> None:
        """Remove the file."""
        with suppress(OSError):  # Closing flushes the rest of the buffer, which may not fit.
            self._stream.close()
        with suppress(FileNotFoundError):
            os.unlink(self._stream.name)


def is_temporary(name: str) -> bool:
    """Return whether a file name is one of these writers' temporary ones."""
    return _TEMPORARY in name


def file_error(error: OSError, path: str | Path | None = None, num_bytes: int = 0) -> Phi4Error:
    """Convert an OSError of a file operation to the error for the user.

    Args:
        error: error of the operating system.
        path: path of the file, if the error does not contain it.
        num_bytes: bytes that were to be written.
    """
    path = path or error.filename or "a file"
    reason = error.strerror or str(error)
    if error.errno not in _FULL:
        return DataError(f"{path}: {reason}; check the path and its permissions")
    with suppress(OSError):
        directory = Path(path).absolute().parent
        reason += f", {shutil.disk_usage(directory).free} bytes are free in {directory}"
    more = f" writing {num_bytes} bytes:" if num_bytes else ""
    return DiskFullError(
        f"{path}:{more} {reason}; free some space or raise the limit, then run the same command "
        f"again"
    )


@contextmanager
def _filling(path: str | Path, num_bytes: int) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise file_error(error, path, num_bytes) from None
        raise


def _remove_leftovers(path: str) -> None:
    """Remove temporary files of killed writers of a path; a live writer holds a lock."""
    for leftover in glob(f"{escape(path)}{_TEMPORARY}*"):
        with suppress(FileNotFoundError), open(leftover, "r+b") as stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise DataError(
                    f"{path} is being written by another process (it holds {leftover}); wait for "
                    "it, or stop it and run this again"
                ) from None
            except OSError:
                continue  # Without locks, it is unknown whether its writer is dead.
            os.unlink(leftover)


def _temporary(path: str | Path) -> str:
    # Processes of several machines may write one name; their ids may be equal.
    return f"{path}{_TEMPORARY}{secrets.token_hex(6)}"


def _sync_and_close(stream: IO[bytes]) -> None:
    stream.flush()
    os.fsync(stream.fileno())
    stream.close()
