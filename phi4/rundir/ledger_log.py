"""ledger.jsonl: the ledger's counts after every step, for blends weighted by loss tokens.

The draws of such a blend depend on all draws before them, and checkpoints are many steps apart.
With a line per step, the draws of any step can be reconstructed from its predecessor's counts.
"""

import mmap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from phi4.data.stream.ledger import Counts
from phi4.errors import DataError
from phi4.rundir.names import LEDGER_FILE

_DRAWN, _LOSS = "drawn/", "loss_tokens/"


def counts_line(ledger: Mapping[str, Any]) -> dict[str, int]:
    """Return a step's line from the ledger's state after it."""
    sources: Mapping[str, dict[str, int]] = ledger["sources"]
    drawn = {f"{_DRAWN}{name}": count["drawn"] for name, count in sources.items()}
    return drawn | {f"{_LOSS}{name}": count["loss_tokens"] for name, count in sources.items()}


def recorded_counts(run_dir: Path, step: int) -> Counts | None:
    """Return what the ledger had counted after a step, or None if not recorded.

    Raises:
        DataError: a line that was read is damaged.
    """
    path = run_dir / LEDGER_FILE
    try:
        with path.open("rb") as file:
            content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (FileNotFoundError, ValueError):  # An empty file cannot be memory-mapped.
        return None
    with content:
        line = _line_of(content, step, path)
    if line is None:
        return None
    names = [key.removeprefix(_DRAWN) for key in line if key.startswith(_DRAWN)]
    return {name: (line[_DRAWN + name], line[_LOSS + name]) for name in names}


def _line_of(content: mmap.mmap, step: int, path: Path) -> dict[str, int] | None:
    """Find the line by bisection; steps increase from line to line."""
    low, high = 0, len(content)
    while low < high:
        middle = (low + high) // 2
        begin = max(low, content.rfind(b"\n", low, middle) + 1)
        end = content.find(b"\n", middle)
        if end < 0:  # A line that a kill cut off.
            high = begin
            continue
        try:
            line = msgspec.json.decode(content[begin:end], type=dict[str, int])
            found = line["step"]
        except (msgspec.DecodeError, KeyError):
            raise DataError(f"{path} is damaged at byte {begin}; remove the file") from None
        if found == step:
            return line
        low, high = (end + 1, high) if found < step else (low, begin)
    return None
