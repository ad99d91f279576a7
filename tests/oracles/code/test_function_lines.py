"""Of what the harness writes, exactly the asked lines in their order count."""

import json
from dataclasses import replace

import pytest

from phi4.oracles.code.function_run import _verdict
from phi4.oracles.code.key import CodeKey, FunctionCase
from phi4.oracles.sandbox import Ended, Outcome
from phi4.oracles.verdict import Grade

NONCES = ["start", "one", "two"]
KEY = CodeKey("python", "f", (FunctionCase([], 1), FunctionCase([], 2)))


def lines(*said: dict) -> bytes:
    return b"".join(json.dumps(one).encode() + b"\n" for one in said)


START, ONE, TWO = {"nonce": "start"}, {"nonce": "one", "value": 1}, {"nonce": "two", "value": 2}
RIGHT = Ended(Outcome.FINISHED, exit_status=0, stdout=lines(START, ONE, TWO))


def test_asked_lines_are_right() -> None:
    assert _verdict(RIGHT, NONCES, KEY) == (Grade.RIGHT, "")


@pytest.mark.parametrize(
    "ended",
    [
        replace(RIGHT, exit_status=1),
        replace(RIGHT, outcome=Outcome.KILLED, exit_status=None),
        replace(RIGHT, outcome=Outcome.TIMEOUT, exit_status=None),
        replace(RIGHT, stdout=lines(START, ONE, TWO, TWO)),
        replace(RIGHT, stdout=lines(START, ONE, TWO) + b"x"),
        replace(RIGHT, stdout=lines(START, ONE, TWO)[:-1]),
        replace(RIGHT, stdout=lines(START, TWO, ONE)),
        replace(RIGHT, stdout=lines(START, ONE)),
        replace(RIGHT, stdout=lines(START, ONE, ONE, TWO)),
        replace(RIGHT, stdout=lines(START, ONE, {"nonce": "other", "value": 2})),
        replace(RIGHT, stdout=lines(START, ONE, {"value": 2})),
        replace(RIGHT, stdout=lines(START, ONE, {"nonce": "two", "problem": "x"})),
        replace(RIGHT, stdout=lines(START, ONE) + b"[2]\n"),
    ],
)
def test_anything_else_is_wrong(ended: Ended) -> None:
    outcome, reason = _verdict(ended, NONCES, KEY)
    assert (outcome, bool(reason)) == (Grade.WRONG, True)


@pytest.mark.parametrize(
    "ended",
    [
        Ended(Outcome.NOT_STARTED, "no"),
        Ended(Outcome.UNDECIDED, "busy"),
        replace(RIGHT, outcome=Outcome.UNDECIDED),
        replace(RIGHT, stdout=b"", stderr=b"no module json", exit_status=1),
        replace(RIGHT, stdout=lines(ONE, TWO)),
    ],
)
def test_run_that_never_reached_the_answer_is_ungradable(ended: Ended) -> None:
    assert _verdict(ended, NONCES, KEY)[0] is Grade.UNGRADABLE
