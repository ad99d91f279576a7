"""A trace of one training step: a file for a trace viewer, and a table of where the time went."""

import re
from collections.abc import Callable, Iterable
from pathlib import Path

ROWS = 25
"""Of the table, the longest first; one more holds what is left."""


def write_trace(directory: Path, name: str, kind: str, step: Callable[[], object]) -> None:
    """Profile one call of a step into <name>.json (Chrome's format) and <name>.txt.

    The table has kernels on a GPU and torch's ops on a CPU, each with the time of itself alone.

    Args:
        directory: is created.
        name: name of the side.
        kind: cpu or cuda.
        step: has ended on the device when it returns.
    """
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU]
    activities += [ProfilerActivity.CUDA] if kind == "cuda" else []
    with profile(activities=activities, acc_events=True) as profiler:
        step()
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")
    profiler.export_chrome_trace(str(path.with_suffix(".json")))
    device = DeviceType.CUDA if kind == "cuda" else DeviceType.CPU
    events = [event for event in profiler.key_averages() if event.device_type == device]
    times = [
        (e.key, e.count, e.self_device_time_total if kind == "cuda" else e.self_cpu_time_total)
        for e in events
        if not getattr(e, "is_user_annotation", False)
    ]
    path.with_suffix(".txt").write_text(top_table(times), encoding="utf-8")


def top_table(times: Iterable[tuple[str, int, float]]) -> str:
    """Return the longest ops first: name, calls, total us, share of all.

    Args:
        times: (op, calls, total us of itself alone).
    """
    ordered = sorted(times, key=lambda item: -item[2])
    shown, left = ordered[:ROWS], ordered[ROWS:]
    if left:
        calls, total = sum(item[1] for item in left), sum(item[2] for item in left)
        shown = [*shown, (f"{len(left)} others", calls, total)]
    whole = sum(item[2] for item in ordered) or 1.0
    lines = [f"{'total us':>12} {'share':>7} {'calls':>7}  op"]
    lines += [f"{us:12.1f} {us / whole:7.1%} {calls:7d}  {op}" for op, calls, us in shown]
    return "\n".join([*lines, f"{sum(item[2] for item in ordered):12.1f} {1:7.1%}{'':9} all", ""])
