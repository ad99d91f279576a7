"""Outputs of a filter: the kept rows of each input, and one file of all removed rows.

Files end in `.part` until all rows are done, so a job that dies leaves nothing that looks complete.
The quarantine has its own suffix, which neither `*.jsonl` nor a directory search matches, so that
the output directory can be the input of the next command.
"""

import errno
import fcntl
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

from phi4.data.files.atomic_files import file_error
from phi4.data.screens.quality.inputs import Input
from phi4.errors import DataError, DiskFullError

QUARANTINE = "quarantine.rejects"


class Outputs:
    """The files of one filter run; a context manager that renames them only when it ends.

    On an error, the kept rows are removed and the quarantine stays as `quarantine.rejects.part` for
    inspection.
    """

    def __init__(self, inputs: Sequence[Input], directory: Path) -> None:
        """Plan `directory/NAME.jsonl` for each input, and the quarantine in the same directory."""
        self._directory = directory
        self._targets = {item.path: directory / f"{item.name}.jsonl" for item in inputs}
        self._quarantine = directory / QUARANTINE
        self._path: Path | None = None
        self._kept: BinaryIO | None = None

    def __enter__(self) -> Self:
        """Create and lock the directory.

        Raises:
            DataError: an output exists, the directory cannot be created, or another job is writing
                to it.
        """
        with writing(self._directory):
            self._directory.mkdir(parents=True, exist_ok=True)
            # Not truncated before it is locked: it may belong to another job.
            self._held = _part(self._quarantine).open("ab")
        try:
            _lock(self._held, self._directory)
            for target in (*self._targets.values(), self._quarantine):
                if target.exists():
                    raise DataError(
                        f"{target} exists; give another output directory or remove the file"
                    )
            self._held.truncate(0)
        except DataError:
            self._held.close()
            raise
        return self

    def keep(self, path: Path, row: bytes) -> None:
        """Write a row of an input; inputs come one after the other.

        Raises:
            DataError, DiskFullError: it cannot be written.
        """
        with writing(self._targets[path]):
            if path != self._path:
                self._open(path)
            assert self._kept is not None
            self._kept.write(row + b"\n")

    def hold(self, row: bytes) -> None:
        """Write a row to the quarantine.

        Raises:
            DataError, DiskFullError: it cannot be written.
        """
        with writing(self._quarantine):
            self._held.write(row + b"\n")

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Rename the files, or remove the kept rows after an error."""
        if error is None:
            try:
                self._finish()
                return
            except (DataError, DiskFullError):
                self._abandon()
                raise
        self._abandon()

    def _open(self, path: Path) -> None:
        if self._kept is not None:
            self._kept.close()
        part = _part(self._targets[path])
        part.parent.mkdir(parents=True, exist_ok=True)
        self._path, self._kept = path, part.open("wb")

    def _finish(self) -> None:
        with writing(self._directory):
            if self._kept is not None:
                self._kept.close()
            self._held.flush()
            for target in self._targets.values():
                part = _part(target)
                part.parent.mkdir(parents=True, exist_ok=True)
                part.touch()  # An input of which no row was kept is an empty file.
                part.rename(target)
            # Last, while locked: another job that waits to begin then finds the outputs.
            _part(self._quarantine).rename(self._quarantine)
            self._held.close()

    def _abandon(self) -> None:
        for stream in (self._kept, self._held):
            # Data that cannot be written now does not matter: the job has failed.
            with suppress(OSError):
                if stream is not None:
                    stream.close()
        for target in self._targets.values():
            _part(target).unlink(missing_ok=True)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Convert errors of writing a file to a one-line error.

    Raises:
        DiskFullError: no space is left on the device or in the quota.
        DataError: anything else.
    """
    try:
        yield
    except OSError as error:
        raise file_error(error, path) from None


def _part(target: Path) -> Path:
    return target.with_name(target.name + ".part")


def _lock(stream: BinaryIO, directory: Path) -> None:
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise DataError(f"another job is writing to {directory}; give each its own --out") from None
    except OSError as error:
        # Some network file systems have no locks; two jobs then collide when they rename files.
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            raise DataError(f"{directory} cannot be locked ({error.strerror})") from None
