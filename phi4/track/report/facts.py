"""The summary of a run's report: what it is, its progress, and how its newest attempt ended."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from phi4.rundir.attempts import Attempt
from phi4.rundir.lease import EXPIRY_SECONDS
from phi4.track.report.quantities import count, duration, moment
from phi4.track.report.reported_run import ReportedRun

UNKNOWN = "not recorded"


class Fact(NamedTuple):
    """One entry of the summary.

    Attributes:
        name: label.
        value: displayed value.
        tone: good, bad or empty; determines the highlighting.
    """

    name: str
    value: str
    tone: str = ""


def facts_of(run: ReportedRun, now: float) -> list[Fact]:
    """Return the summary of a run.

    Args:
        run: run to describe.
        now: seconds since the epoch, to decide whether the run is still alive.
    """
    recipe, steps = run.record.recipe, run.record.steps
    last = steps[-1] if steps else {}
    wall = run.goodput.wall_seconds
    about = run.about.get(max(run.record.attempts, default=0), {})
    return [
        _status(run, now),
        Fact("stage", recipe.run.stage),
        Fact("steps", f"{last.get('step', 0):,} of {recipe.run.steps:,}"),
        Fact("tokens", count(last["consumed_tokens"]) if "consumed_tokens" in last else UNKNOWN),
        Fact("final loss", _last(run, "loss")),
        Fact("held-out loss", _last(run, "held_out_loss")),
        Fact("wall time", duration(wall) if wall > 0 else UNKNOWN),
        Fact("goodput", f"{run.goodput.share:.1%}" if wall > 0 else UNKNOWN),
        Fact("attempts", f"{len(run.record.attempts):,}"),
        Fact("host", _host(run)),
        Fact("git commit", _commit(about)),
        Fact("directory", str(run.record.run_dir.resolve())),
    ]


def how_it_ended(attempt: Attempt) -> str:
    """Describe an attempt's end in words; empty if not recorded."""
    if attempt.outcome:
        words: str = attempt.outcome
        if attempt.preempted:
            words += ", preempted"
        return f"{words}: {attempt.reason}" if attempt.reason else words
    if not attempt.ended:
        return ""
    if not attempt.started_unix:
        return "ended; version 0.1 did not record how"
    return "killed" if attempt.ended == "released" else f"killed ({attempt.ended})"


def _status(run: ReportedRun, now: float) -> Fact:
    if not run.record.attempts:
        return Fact("status", UNKNOWN)
    attempt = run.record.attempts[max(run.record.attempts)]
    words = how_it_ended(attempt)
    if not words:
        seen = run.last_sign_unix()
        if now - seen <= EXPIRY_SECONDS:
            left = run.record.steps[-1].get("eta_seconds") if run.record.steps else None
            return Fact("status", f"running, {duration(left)} left" if left else "running")
        words = f"killed or lost: no sign of life since {moment(seen)} UTC"
        return Fact("status", words, "bad")
    tones = {"finished": "good", "failed": "bad"}
    is_killed = words.startswith("killed")
    return Fact("status", words, "bad" if is_killed else tones.get(attempt.outcome, ""))


def _last(run: ReportedRun, key: str) -> str:
    """Return the newest value, which may be NaN."""
    for line in reversed(run.record.steps):
        if key in line:
            at = "" if line is run.record.steps[-1] else f" (step {line['step']:,})"
            return f"{_loss(line[key])}{at}"
    return UNKNOWN


def _loss(value: float) -> str:
    return f"{value:.4f}" if math.isfinite(value) else str(value)


def _host(run: ReportedRun) -> str:
    if not run.record.attempts:
        return UNKNOWN
    return run.record.attempts[max(run.record.attempts)].process.host or UNKNOWN


def _commit(about: Mapping[str, Any]) -> str:
    tree = about.get("source_tree") or {}
    if "commit" not in tree:
        return UNKNOWN
    return f"{tree['commit'][:12]}{', with changes' if tree.get('is_dirty') else ''}"
