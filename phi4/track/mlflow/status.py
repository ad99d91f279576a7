"""How a run and its attempts ended, in MLflow's words."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from phi4.rundir.attempts import Attempt, attempt_path, newest_attempt, read_attempt
from phi4.track.record import Status

_STATUS = {"finished": "FINISHED", "failed": "FAILED", "interrupted": "KILLED"}
_KILLED = "killed: it ended without a word (kill -9, out of memory, or its machine was lost)"


class Conclusion(NamedTuple):
    """How a run stands in MLflow once nobody trains it.

    Attributes:
        status: FINISHED, FAILED or KILLED.
        ended_unix: seconds since the epoch.
        tags: what is known of its attempts.
    """

    status: str
    ended_unix: float
    tags: Mapping[str, str]


def read_attempts(run_dir: Path) -> dict[int, Attempt]:
    """The attempts of a run, by number."""
    numbers = range(1, newest_attempt(run_dir) + 1)
    found = {number: read_attempt(attempt_path(run_dir, number)) for number in numbers}
    return {number: attempt for number, attempt in found.items() if attempt is not None}


def attempt_tags(attempts: Mapping[int, Attempt]) -> dict[str, str]:
    """`attempt_N` of attempts that are over, and `preempted` of the newest that says it."""
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
    """How a run ended.

    What its newest attempt wrote down counts, then what the process said; where it was killed, the
    run is finished if it has all its steps, else it failed.

    Args:
        attempts: all of them.
        said: by the process that trained.
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
