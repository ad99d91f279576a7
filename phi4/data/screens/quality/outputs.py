"""What a screen writes: the kept rows of each input, and one file of all that was taken out.

Files end in `.part` until all rows are through, so a job that dies leaves nothing that looks
complete. The quarantine has a suffix of its own: neither `*.jsonl` nor the search of a directory
takes it for rows, so that the output can be the input of the next command as it is.
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
    """The files of one screen; a context that names them at its end, and only then.

    When it ends with an error, the kept rows are removed and the quarantine stays as
    `quarantine.rejects.part` to be looked at.
    """

    def __init__(self, inputs: Sequence[Input], directory: Path) -> None:
        """Plan `directory/NAME.jsonl` for each input, and the quarantine beside them."""
        self._directory = directory
        self._targets = {item.path: directory / f"{item.name}.jsonl" for item in inputs}
        self._quarantine = directory / QUARANTINE
        self._path: Path | None = None
        self._kept: BinaryIO | None = None

    def __enter__(self) -> Self:
        """Make and lock the directory.

        Raises:
            DataError: an output exists, the directory cannot be made, or another screen is at it.
        """
        with writing(self._directory):
            self._directory.mkdir(parents=True, exist_ok=True)
            # Not truncated before it is locked: it may be another screen's.
            self._held = _part(self._quarantine).open("ab")
        try:
            _lock(self._held, self._directory)
            for target in (*self._targets.values(), self._quarantine):
                if target.exists():
                    raise DataError(f"{target} exists; give another output directory or remove it")
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
        """Write a row into quarantine.

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
        """Give the files their names, or remove the kept rows after an error."""
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
                part.touch()  # an input of which no row was kept is an empty file
                part.rename(target)
            # Last, and while it is locked: another screen that waits to begin sees the outputs.
            _part(self._quarantine).rename(self._quarantine)
            self._held.close()

    def _abandon(self) -> None:
        for stream in (self._kept, self._held):
            # What cannot be written any more is not missed: it is the job that failed.
            with suppress(OSError):
                if stream is not None:
                    stream.close()
        for target in self._targets.values():
            _part(target).unlink(missing_ok=True)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what goes wrong while a file is written into one clear line.

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
        raise DataError(
            f"another screen is writing to {directory}; give each its own --out"
        ) from None
    except OSError as error:
        # Some network file systems have no locks; two screens then collide when they give names.
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            raise DataError(f"{directory} cannot be locked ({error.strerror})") from None
