"""docs/metrics.md, and what of a record it explains."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

_PAGE = Path(__file__).parents[2] / "docs/metrics.md"


def unexplained(lines: Iterable[Mapping[str, float]]) -> list[str]:
    """Keys without a row on the page; capitals in a row's key stand for any name."""
    names = re.findall(r"^\| `([^`]+)`", _PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    known = re.compile("|".join(re.sub(r"[A-Z]{2,}", ".+", re.escape(name)) for name in names))
    return sorted({key for line in lines for key in line if not known.fullmatch(key)})
