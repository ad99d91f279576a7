"""Write several files of rows that get their names together, when all rows are complete."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import msgspec

from phi4.data.files.atomic_files import HashedFile, write_atomically


class RowFiles:
    """JSON Lines files of one directory; if the block fails, none of them is left.

    Args:
        directory: created if missing.
        names: names of the files.
    """

    def __init__(self, directory: Path, names: Iterable[str]) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._files = {name: HashedFile(str(directory / name)) for name in names}

    def add(self, name: str, row: object) -> None:
        """Append a row to a file."""
        self._files[name].write(msgspec.json.encode(row) + b"\n")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None
    ) -> None:
        if kind is not None:
            for file in self._files.values():
                file.discard()
            return
        for file in self._files.values():
            file.finish()
        for file in self._files.values():
            file.publish()


def write_report(path: Path, report: Mapping[str, Any]) -> None:
    """Write a report as human-readable JSON."""
    text = json.dumps(report, indent=2, ensure_ascii=False)
    write_atomically(path, f"{text}\n".encode(errors="replace"))
