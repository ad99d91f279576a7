"""Samples of a run's machines: in RUN/system/node_0.jsonl, and as metric points.

The file is the record; the sender of points reads it, for other nodes too. A kill or a full disk
may cut a line off.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from phi4.rundir.names import SYSTEM_DIR

_NODE_FILE = "node_{}.jsonl"
_TAIL_BYTES = 1 << 16
"""Size of the end of a file in which its last sample is searched."""


class SystemSample(NamedTuple):
    """One sample of one machine, as MLflow shows it under System metrics.

    Attributes:
        node: index of the machine.
        sample: sample number, from 1; the step of the points.
        unix_seconds: timestamp of the points.
        metrics: by names that begin with `system/node_0/`.
    """

    node: int
    sample: int
    unix_seconds: float
    metrics: dict[str, float]


def last_samples(held: Mapping[str, int]) -> dict[int, int]:
    """Return the number of the last sample in a store, by node.

    Args:
        held: greatest step by name of the metric.
    """
    found: dict[int, int] = {}
    for name, step in held.items():
        node = name.removeprefix("system/node_").partition("/")[0]
        if name.startswith("system/node_") and node.isdecimal():
            found[int(node)] = max(step, found.get(int(node), 0))
    return found


class SystemTail:
    """Reads the samples of all machines of a run as they are written.

    Args:
        run_dir: run directory of the run.
        after: by node, the number of the last sample that is not needed.
    """

    def __init__(self, run_dir: Path, after: Mapping[int, int] | None = None) -> None:
        self._directory = run_dir / SYSTEM_DIR
        self._after = dict(after or {})
        self._offsets: dict[Path, int] = {}

    def read(self) -> list[SystemSample]:
        """Return what is new since the last call: of every machine, in order."""
        return [sample for path in _node_files(self._directory) for sample in self._new(*path)]

    def _new(self, node: int, path: Path) -> Iterator[SystemSample]:
        try:
            with path.open("rb") as file:
                file.seek(self._offsets.get(path, 0))
                text = file.read()
        except OSError:
            return
        whole = text[: text.rfind(b"\n") + 1]
        self._offsets[path] = self._offsets.get(path, 0) + len(whole)
        for line in _decoded(whole):
            # Two samplers of one node, after a machine came back, must not send a step twice.
            if line["sample"] > self._after.get(node, 0):
                self._after[node] = line["sample"]
                yield _as_sample(node, line)


def samples_path(run_dir: Path, node: int) -> Path:
    """Return the path of a machine's samples."""
    return run_dir / SYSTEM_DIR / _NODE_FILE.format(node)


def _node_files(directory: Path) -> list[tuple[int, Path]]:
    try:
        names = [path.name for path in directory.iterdir()]
    except OSError:
        return []
    parts = ((name, name.removeprefix("node_").removesuffix(".jsonl")) for name in names)
    nodes = sorted(int(node) for name, node in parts if node.isdecimal() and name != node)
    return [(node, directory / _NODE_FILE.format(node)) for node in nodes]


def last_sample(path: Path) -> int:
    """Return the number of the last sample in a file; 0 without one."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
            return max((line["sample"] for line in _decoded(file.read())), default=0)
    except OSError:
        return 0


def append_sample(path: Path, line: Mapping[str, float]) -> None:
    """Append a sample on a new line, even after one that was cut off."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab", buffering=0) as file:
        text = msgspec.json.encode(line) + b"\n"
        if _ends_within_a_line(path):
            text = b"\n" + text
        file.write(text)


def _ends_within_a_line(path: Path) -> bool:
    with path.open("rb") as file:
        if file.seek(0, os.SEEK_END) == 0:
            return False
        file.seek(-1, os.SEEK_END)
        return file.read() != b"\n"


def _decoded(text: bytes) -> Iterator[dict[str, Any]]:
    """Return the lines that are samples; a kill may have cut one off."""
    for line in text.splitlines():
        with suppress(msgspec.DecodeError):
            decoded = msgspec.json.decode(line)
            if isinstance(decoded, dict) and {"sample", "unix_seconds"} <= decoded.keys():
                yield decoded


def _as_sample(node: int, line: dict[str, Any]) -> SystemSample:
    facts = ("sample", "unix_seconds")
    metrics = {f"system/node_{node}/{k}": float(v) for k, v in line.items() if k not in facts}
    return SystemSample(node, line["sample"], line["unix_seconds"], metrics)
