"""Map the end of a run and its attempts to MLflow's statuses."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from phi4.rundir.attempts import Attempt, attempt_path, newest_attempt, read_attempt
from phi4.track.record import Status

_STATUS = {"finished": "FINISHED", "failed": "FAILED", "interrupted": "KILLED"}
_KILLED = (
    "killed: it ended without recording a reason (kill -9, out of memory, or its machine was lost)"
)


class Conclusion(NamedTuple):
    """Final status of a run in MLflow.

    Attributes:
        status: FINISHED, FAILED or KILLED.
        ended_unix: seconds since the epoch.
        tags: tags about its attempts.
    """

    status: str
    ended_unix: float
    tags: Mapping[str, str]


def read_attempts(run_dir: Path) -> dict[int, Attempt]:
    """Read the attempts of a run, by number."""
    numbers = range(1, newest_attempt(run_dir) + 1)
    found = {number: read_attempt(attempt_path(run_dir, number)) for number in numbers}
    return {number: attempt for number, attempt in found.items() if attempt is not None}


def attempt_tags(attempts: Mapping[int, Attempt]) -> dict[str, str]:
    """Return `attempt_N` of attempts that are over, and `preempted` of the newest that recorded
    it."""
    tags = {f"attempt_{number}": _how(attempt) for number, attempt in attempts.items()}
    told = [one.preempted for one in attempts.values() if one.preempted is not None]
    return tags | {"preempted": str(told[-1]).lower()} if told else tags


def conclusion(
    attempts: Mapping[int, Attempt],
    said: Status | None = None,
    *,
    has_all_steps: bool,
    last_unix: float,
) -> Conclusion:
    """Determine how a run ended.

    The record of its newest attempt has precedence over the process's report; a killed run is
    finished if it has all its steps, otherwise failed.

    Args:
        attempts: all of them.
        said: reported by the training process.
        has_all_steps: whether the record reaches run.steps.
        last_unix: time of the record's last line.
    """
    newest = attempts[max(attempts)] if attempts else None
    outcome = (newest.outcome if newest else "") or said or ""
    tags = attempt_tags(attempts)
    if newest and said and not newest.outcome:
        tags[f"attempt_{max(attempts)}"] = said
    status = _STATUS.get(outcome) or ("FINISHED" if has_all_steps else "FAILED")
    ended_unix = (newest.ended_unix if newest else 0.0) or (time.time() if said else last_unix)
    return Conclusion(status, ended_unix or time.time(), tags)


def _how(attempt: Attempt) -> str:
    if not attempt.outcome:
        return _KILLED
    return f"{attempt.outcome}: {attempt.reason}" if attempt.reason else attempt.outcome
