"""Format quantities for readers."""

import math
from datetime import UTC, datetime


def duration(seconds: float) -> str:
    """Format seconds in their two leading units; `1 h 02 min`."""
    if not math.isfinite(seconds):
        return "unknown"
    if seconds < 10:
        return f"{seconds:.2f} s"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours:02} h"
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s"


def count(value: float) -> str:
    """Format a number of tokens; `1.25 B`."""
    for limit, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= limit:
            return f"{value / (limit if unit != 'k' else 1e3):.4g} {unit}"
    return f"{value:,.0f}"


def moment(unix_seconds: float) -> str:
    """Format a time in UTC; `2026-01-31 12:00:00`."""
    return datetime.fromtimestamp(unix_seconds, UTC).strftime("%Y-%m-%d %H:%M:%S")


def memory(num_bytes: float) -> str:
    """Format bytes in binary units."""
    for power, unit in ((3, "GiB"), (2, "MiB"), (1, "KiB")):
        if num_bytes >= 1024**power:
            return f"{num_bytes / 1024**power:.3g} {unit}"
    return f"{num_bytes:.0f} B"


def time_unit(seconds: float) -> tuple[float, str]:
    """Return the length in seconds, and the name, of a suitable unit for an axis of some
    seconds."""
    if seconds < 600:
        return 1.0, "seconds"
    return (60.0, "minutes") if seconds < 4 * 3600 else (3600.0, "hours")
