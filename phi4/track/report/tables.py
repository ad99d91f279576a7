"""Tables of one run: wall time, attempts, checkpoints, schedule, data, layout, kernels."""

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from phi4.rundir.attempts import Attempt
from phi4.rundir.goodput import BUCKETS
from phi4.rundir.save_log import SaveEvent
from phi4.track.report.facts import how_it_ended
from phi4.track.report.quantities import duration, memory, moment
from phi4.track.report.reported_run import ReportedRun
from phi4.track.report.table import Table, step_range
from phi4.track.report.trouble import trouble_table

_ABOUT = (
    *("command", "directory", "user", "host", "launched_by", "source_tree", "python", "packages"),
    *("platform", "gpu", "origins"),
)
"""Fields that no other table shows."""

_LONG_SECONDS = 600.0


def wall_time_table(run: ReportedRun) -> Table | None:
    """Return seconds by bucket, which sum to the wall time; None if not recorded."""
    wall = run.goodput.wall_seconds
    if wall <= 0:
        return None
    seconds = {name: run.goodput.seconds.get(name, 0.0) for name in BUCKETS}
    # Rounded as displayed, so that the displayed numbers add up.
    digits = 3 if wall < _LONG_SECONDS else 1
    shown = {name: round(value, digits) for name, value in seconds.items() if value > 0}
    left = round(round(wall, digits) - sum(shown.values()), digits)
    if left:
        shown["in no bucket" if left > 0 else "in two buckets"] = left
    rows = [
        (name.replace("_", " "), f"{value:.{digits}f}", f"{value / wall:.2%}")
        for name, value in shown.items()
    ]
    foot = ("wall time", f"{wall:.{digits}f}", "100.00%")
    notes = (
        "step: steps that count. restart: between attempts, the start-up of later attempts, and "
        "work that a kill lost. roll back: steps that were undone, and going back.",
    )
    head = ("bucket", "seconds", "share")
    return Table("wall-time", "Wall time by bucket", head, rows, notes, (1, 2), foot)


def attempts_table(run: ReportedRun) -> Table | None:
    """Return every start of the run."""
    by_attempt: dict[int, list[int]] = {}
    times: dict[int, float] = {}
    for line in (*run.record.steps, *run.undone):
        if "attempt" in line:
            number = int(line["attempt"])
            by_attempt.setdefault(number, []).append(line["step"])
            times[number] = max(times.get(number, 0.0), line.get("unix_seconds", 0.0))
    rows = []
    for number, attempt in sorted(run.record.attempts.items()):
        steps = by_attempt.get(number, [])
        rows.append(
            (
                str(number),
                attempt.started_at.replace("T", " ").removesuffix("Z"),
                _end(attempt, times.get(number, 0.0)),
                _length(attempt),
                how_it_ended(attempt) or "running or lost",
                step_range(min(steps), max(steps)) if steps else "",
                attempt.process.host + (f", job {attempt.job}" if attempt.job else ""),
            )
        )
    head = ("attempt", "start (UTC)", "end (UTC)", "lasted", "how it ended", "steps", "host")
    return Table("attempts", "Attempts", head, rows, (), (0,)) if rows else None


def _end(attempt: Attempt, last_line_unix: float) -> str:
    if attempt.ended_unix:
        return moment(attempt.ended_unix)
    return f"after {moment(last_line_unix)}" if last_line_unix else ""


def _length(attempt: Attempt) -> str:
    if not (attempt.started_unix and attempt.ended_unix):
        return ""
    return duration(attempt.ended_unix - attempt.started_unix)


def checkpoints_table(run: ReportedRun) -> Table | None:
    """Return every save and its outcome."""
    saves: dict[tuple[int, int], list[SaveEvent]] = {}
    for event in run.record.saves:
        saves.setdefault((event.attempt, event.step), []).append(event)
    rows = [_save_row(run, step, attempt, saves[attempt, step]) for attempt, step in saves]
    head = (
        *("step", "attempt", "state", "durable at (UTC)", "took", "training blocked"),
        *("second copy", "on the disk", "manifest sha256"),
    )
    notes = ("The hash of the manifest is cut to its first 12 digits.",)
    return Table("checkpoints", "Checkpoints", head, rows, notes, (0, 1)) if rows else None


def _save_row(
    run: ReportedRun, step: int, attempt: int, events: Sequence[SaveEvent]
) -> tuple[str, ...]:
    own = [event for event in events if not event.state.endswith("replicated")]
    last = own[-1] if own else events[-1]
    copies = [event for event in events if event.state.endswith("replicated")]
    copy = copies[-1].state.replace("_", " ") if copies else ""
    state = f"{last.state}: {last.reason}" if last.reason else last.state
    return (
        f"{step:,}",
        str(attempt),
        state,
        moment(last.unix_seconds) if last.state == "durable" else "",
        duration(last.seconds) if last.seconds is not None else "",
        duration(last.stall_seconds) if last.stall_seconds is not None else "",
        f"{copy}: {copies[-1].reason}" if copies and copies[-1].reason else copy,
        "yes" if step in run.kept_steps and last.state == "durable" else "no",
        last.manifest_sha256[:12],
    )


def schedule_table(run: ReportedRun) -> Table | None:
    """Return schedule keys that changed during the run."""
    changes = run.state.history if run.state else ()
    rows = [
        (str(change.step), change.key, _json(change.before), _json(change.after))
        for change in changes
    ]
    head = ("after step", "key", "before", "after")
    return Table("schedule", "Changes of the schedule", head, rows, (), (0,)) if rows else None


def sources_table(run: ReportedRun) -> Table | None:
    """Return what was drawn from every source, according to the newest checkpoint's ledger."""
    if run.state is None:
        return None
    ledger = run.state.data
    sources = ledger.get("sources") if isinstance(ledger, dict) else None
    if not isinstance(sources, dict):
        return None
    weights = {source.name: source.weight for source in run.record.recipe.data.sources}
    total = sum(weights.values())
    drawn = sum(one.get("drawn", 0) for one in sources.values())
    rows = []
    for name, one in sorted(sources.items()):
        units, size = one.get("drawn", 0), one.get("num_units", 0)
        asked = f"{weights[name] / total:.2%}" if name in weights and total else ""
        share = f"{units / drawn:.2%}" if drawn else ""
        epochs = f"{units / size:.3f}" if size else ""
        digest = str(one.get("content", ""))[:12]
        rows.append((name, asked, share, f"{units:,}", epochs, digest))
    notes = (f"As of step {run.state.step:,}, from the ledger in its checkpoint.",)
    head = ("source", "asked now", "drawn", "units drawn", "epochs", "sha256")
    return Table("sources", "Sources", head, rows, notes, (1, 2, 3, 4))


def kernels_table(run: ReportedRun) -> Table | None:
    """Return the implementation of every op, per attempt where it changed; else those qualified."""
    rows: list[tuple[str, ...]] = []
    before: Mapping[str, str] = {}
    for number, about in sorted(run.about.items()):
        kernels, reasons = about.get("kernels", {}), about.get("kernel_reasons", {})
        rows += [
            (str(number), op, name, reasons.get(op, ""))
            for op, name in sorted(kernels.items())
            if before.get(op) != name
        ]
        before = kernels
    if rows:
        head = ("from attempt", "op", "implementation", "reason")
        return Table("kernels", "Kernels", head, rows, (), (0,))
    rows = [
        (
            str(row.get("host", "")),
            str(row.get("op", "")),
            str(row["implementation"]),
            "proven" if row.get("green") else "red",
        )
        for row in run.kernel_rows
        if "implementation" in row
    ]
    head = ("host", "op", "implementation", "verdict")
    return Table("kernels", "Kernels qualified at the start", head, rows) if rows else None


def layout_table(run: ReportedRun) -> Table | None:
    """Return the layout, per attempt where it changed; from the newest recipe if not recorded."""
    rows: list[tuple[str, str, str]] = []
    for number, about in sorted(run.about.items()):
        text, ranks = about.get("layout", ""), str(about.get("world_size", ""))
        if text and (not rows or rows[-1][1:] != (text, ranks)):
            rows.append((str(number), text, ranks))
    if rows:
        head = ("from attempt", "layout", "ranks")
        return Table("layout", "Layout", head, rows, (), (0, 2))
    parallel = run.record.recipe.parallel.model_dump(mode="json", exclude_defaults=True)
    degrees = [f"{name} {_json(value)}" for name, value in parallel.items()]
    text = ", ".join(degrees) or "one rank, no parallelism"
    notes = ("From the recipe of the newest attempt; earlier layouts were not recorded.",)
    newest = str(max(run.record.attempts, default=1))
    return Table("layout", "Layout", ("attempt", "layout"), [(newest, text)], notes, (0,))


def memory_table(run: ReportedRun) -> Table | None:
    """Return the largest value of each kind of memory."""
    rows = []
    for key in run.lines.keys_under("memory/"):
        curve = run.lines.curve(key)
        if curve.values.size:
            kind = key.removeprefix("memory/").replace("_", " ")
            rows.append((kind, memory(curve.values.max()), memory(curve.values[-1])))
    head = ("kind", "largest", "at the last step")
    return Table("memory", "Memory", head, rows, (), (1, 2)) if rows else None


def about_table(run: ReportedRun) -> Table | None:
    """Return metadata of the newest attempt that other tables do not show."""
    if not run.about:
        return None
    about = run.about[max(run.about)]
    rows = [(key.replace("_", " "), _words(about[key])) for key in _ABOUT if about.get(key)]
    return Table("about", "About the newest attempt", ("what", "value"), rows) if rows else None


def _words(value: Any) -> str:
    """Format a value for readers."""
    if isinstance(value, dict):
        return ", ".join(
            f"{key} {_words(one)}" for key, one in value.items() if one not in ("", {})
        )
    if isinstance(value, list):
        return " ".join(_words(one) for one in value)
    return _json(value)


def tables_of(run: ReportedRun) -> dict[str, Table]:
    """Return all tables with content, by name."""
    makers = (
        *(wall_time_table, attempts_table, trouble_table, checkpoints_table, sources_table),
        *(layout_table, kernels_table, schedule_table, memory_table, about_table),
    )
    tables = [maker(run) for maker in makers]
    return {table.name: table.newest() for table in tables if table is not None}


def _json(value: Any) -> str:
    if isinstance(value, str):
        return value
    return msgspec.json.encode(value).decode()
