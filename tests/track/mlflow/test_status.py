"""How a run ended, from what its attempts wrote down."""

import pytest

from phi4.rundir.attempts import Attempt
from phi4.rundir.process import Process
from phi4.track.mlflow.status import attempt_tags, conclusion

HERE = Process("a host", "", 1, 1)


def attempt(outcome: str = "", **fields) -> Attempt:
    return Attempt(HERE, "", "today", outcome=outcome, **fields)


@pytest.mark.parametrize(
    ("newest", "said", "has_all_steps", "status", "tag"),
    [
        (attempt("finished"), "finished", True, "FINISHED", "finished"),
        (attempt("failed", reason="DivergedError: x"), None, False, "FAILED", "failed: Div"),
        (attempt("interrupted", reason="SIGTERM"), None, False, "KILLED", "interrupted: SIG"),
        (attempt("failed", reason="DiskFullError: y"), None, True, "FAILED", "failed: Disk"),
        (attempt(), None, False, "FAILED", "killed: it ended without recording a reason"),
        (attempt(), None, True, "FINISHED", "killed: it ended without recording a reason"),
        # Where the disk took no note of the end, the process still said it.
        (attempt(), "interrupted", False, "KILLED", "interrupted"),
    ],
)
def test_status_is_the_newest_attempts(newest, said, has_all_steps, status, tag):
    attempts = {1: attempt("finished"), 2: newest}
    found = conclusion(attempts, said, has_all_steps=has_all_steps, last_unix=7.0)
    assert found.status == status
    assert found.tags["attempt_2"].startswith(tag)
    assert found.tags["attempt_1"] == "finished"


def test_time_of_the_end_is_that_of_the_attempt_or_of_the_last_line():
    ended = {1: attempt("failed", ended_unix=5.0)}
    assert conclusion(ended, has_all_steps=False, last_unix=7.0).ended_unix == 5.0
    assert conclusion({1: attempt()}, has_all_steps=False, last_unix=7.0).ended_unix == 7.0


def test_preempted_is_the_newest_word_of_it():
    attempts = {
        1: attempt("interrupted", preempted=True),
        2: attempt("interrupted", preempted=False),
        3: attempt(),
    }
    assert attempt_tags(attempts)["preempted"] == "false"
    assert "preempted" not in attempt_tags({3: attempt()})
