"""Table of problems of a run and the reaction to them: skipped updates, rollbacks, lost work."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from phi4.track.report.reported_run import ReportedRun
from phi4.track.report.table import Table, step_range

Row = tuple[float, tuple[str, ...]]
"""Position of a row, and its texts."""


def trouble_table(run: ReportedRun) -> Table | None:
    """Return skipped updates, rollbacks, layers that stopped using FP8 and lost work."""
    found = [*_skipped_updates(run), *_skipped_data(run), *_left_fp8(run), *_lost_work(run)]
    rows = [texts for _, texts in sorted(found)]
    head = ("step", "what happened", "what was done")
    return Table("trouble", "Spikes, rollbacks and lost work", head, rows) if rows else None


def _skipped_updates(run: ReportedRun) -> Iterator[Row]:
    """Return steps whose update was skipped, consecutive ones in one row."""
    groups: list[list[Mapping[str, Any]]] = []
    for line in sorted((*run.record.steps, *run.undone), key=_by_attempt):
        if not line.get("skipped"):
            continue
        before = groups[-1][-1] if groups else None
        is_next = (
            before is not None
            and line["step"] == before["step"] + 1
            and line.get("attempt") == before.get("attempt")
        )
        if not is_next:
            groups.append([])
        groups[-1].append(line)
    for group in groups:
        losses = [f"{line.get('loss', math.nan):.4g}" for line in group[:3]]
        norms = [f"{line.get('grad_norm', math.nan):.4g}" for line in group[:3]]
        more = ", ..." if len(group) > 3 else ""
        what = f"loss {', '.join(losses)}{more}; gradient norm {', '.join(norms)}{more}"
        updates = f"{len(group)} updates" if len(group) > 1 else "the update"
        is_undone = group[-1].get("undone_by", "")
        after = {"roll_back": ", then rolled back", "resume": ", then lost"}.get(is_undone, "")
        yield group[0]["step"], (_range(group), what, f"skipped {updates}{after}")


def _by_attempt(line: Mapping[str, Any]) -> tuple[float, float, int]:
    return line.get("attempt", 0), line.get("unix_seconds", 0.0), line["step"]


def _skipped_data(run: ReportedRun) -> Iterator[Row]:
    for skip in run.state.skips if run.state else ():
        first = skip.after_step + 1
        rows = f"{skip.rows:,} rows of data skipped"
        if skip.last_undone > skip.after_step:
            done = f"rolled back to step {skip.after_step}, steps undone; {rows}"
            steps = f"{first} to {skip.last_undone}" if skip.last_undone > first else str(first)
            # After the updates that were skipped in it.
            yield skip.last_undone + 0.5, (steps, skip.reason or "roll back", done)
        else:
            yield first, (str(first), skip.reason or "requested by the recipe", rows)


def _left_fp8(run: ReportedRun) -> Iterator[Row]:
    for one in run.state.fp8_fallbacks if run.state else ():
        yield one.step, (str(one.step), one.reason, f"layer {one.layer} stops using FP8")


def _lost_work(run: ReportedRun) -> Iterator[Row]:
    lost: dict[int, list[Mapping[str, Any]]] = {}
    for line in run.undone:
        if line.get("undone_by") == "resume":
            lost.setdefault(int(line.get("attempt", 0)), []).append(line)
    for number, lines in lost.items():
        lines.sort(key=lambda line: line["step"])
        what = f"attempt {number} ended before they were saved"
        steps = f"{len(lines):,} steps" if len(lines) > 1 else "the step"
        yield lines[-1]["step"] + 0.6, (_range(lines), what, f"{steps} done again")


def _range(lines: Sequence[Mapping[str, Any]]) -> str:
    return step_range(lines[0]["step"], lines[-1]["step"])
