"""Waiting for what other processes do, without counting on the speed of this machine."""

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

LONG_SECONDS = 600.0
"""Bound of every wait for something that must happen. Only a hang takes that long."""

_POLL_SECONDS = 0.02


def compute(seconds: float) -> None:
    """Use so much processor time in this thread."""
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass


def wait_until(happened: Callable[[], T], what: str) -> T:
    """Call `happened` until it returns something true, and return that.

    Args:
        happened: cheap; called every 20 ms.
        what: names the event in the error.

    Raises:
        TimeoutError: LONG_SECONDS passed.
    """
    deadline = time.monotonic() + LONG_SECONDS
    while not (result := happened()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {LONG_SECONDS:.0f} s in vain for: {what}")
        time.sleep(_POLL_SECONDS)
    return result
