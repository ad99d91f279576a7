"""Find the inputs of a filter: files of rows in any number of directories, with a name for each.

The name determines the output file, so it is as distinct as the paths: two files of the same name
in two directories stay two files in the output.
"""

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from phi4.data.files.inputs import Form, find_inputs, form_of
from phi4.data.files.jsonl import JSON_SUFFIXES, LINE_SUFFIXES
from phi4.errors import DataError

_ROW_SUFFIXES = (*LINE_SUFFIXES, *JSON_SUFFIXES, ".parquet")


@dataclass(frozen=True)
class Input:
    """One file of rows.

    Attributes:
        path: path of the file.
        name: name without the suffix; a relative path, with directories if names alone would clash.
    """

    path: Path
    name: str


def list_inputs(inputs: Iterable[str | Path]) -> list[Input]:
    """List files in order; those of a directory, at any depth, in sorted path order.

    A file's name is its base name, or for a file in a directory its path below that directory. If
    two would have the same name, all get their paths below their common directory.

    Raises:
        DataError: a file is missing, given twice or has no rows, a directory has no file of rows,
            or two still have the same name.
    """
    found = [pair for item in map(Path, inputs) for pair in _files(item)]
    if not found:
        return []
    path, count = Counter(os.path.realpath(path) for _, path in found).most_common(1)[0]
    if count > 1:
        raise DataError(f"{path} is given {count} times; give each file once")
    names = [_stem(path, root) for root, path in found]
    if len(set(names)) < len(names):
        common = os.path.commonpath([os.path.abspath(root) for root, _ in found])
        names = [_stem(Path(os.path.abspath(path)), Path(common)) for _, path in found]
    name, count = Counter(names).most_common(1)[0]
    if count > 1:
        twice = [str(path) for (_, path), n in zip(found, names, strict=True) if n == name]
        raise DataError(
            f"{' and '.join(twice[:2])} would both get the name {name}; rename or remove one"
        )
    return [Input(path, name) for (_, path), name in zip(found, names, strict=True)]


def _files(item: Path) -> Iterator[tuple[Path, Path]]:
    """Return pairs of the directory that an input's name is relative to, and the file."""
    # A text file is one document, and has no rows to remove.
    found = [Path(f.path) for f in find_inputs([item]).files if form_of(f.path) is not Form.TEXT]
    if not found:
        raise DataError(f"{item} holds no rows; give {', '.join(_ROW_SUFFIXES)} or a directory")
    root = item if item.is_dir() else item.parent
    yield from ((root, path) for path in found)


def _stem(path: Path, root: Path) -> str:
    name = path.relative_to(root).as_posix()
    suffix = max((s for s in _ROW_SUFFIXES if name.lower().endswith(s)), key=len)
    return name[: -len(suffix)]
