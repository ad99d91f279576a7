"""Token timing: latency per client, and throughput."""

import time
from collections.abc import Callable

from prometheus_client import Histogram

_WINDOW_SECONDS = 10
_FIRST_TOKEN_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
_BETWEEN_TOKENS_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)


class TokenRate:
    """Tokens per second over the last ten full seconds; one thread adds, any thread reads.

    Args:
        clock: returns seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        # Second and its token count in one value: a reader sees both or neither.
        self._slots = [(0, 0)] * (_WINDOW_SECONDS + 1)

    def add(self, num_tokens: int) -> None:
        """Count some tokens now."""
        second = int(self._clock())
        slot = second % len(self._slots)
        noted, before = self._slots[slot]
        self._slots[slot] = second, num_tokens + (before if noted == second else 0)

    def per_second(self) -> float:
        """Return the rate, without the current second."""
        now = int(self._clock())
        in_window = range(now - _WINDOW_SECONDS, now)
        return sum(tokens for second, tokens in self._slots if second in in_window) / len(in_window)


class Timing:
    """Token timing of one server.

    Attributes:
        first_token: seconds from a request to its first token, including queueing.
        between_tokens: seconds between two tokens of a sample.
        rate: rate of new tokens.
    """

    def __init__(self) -> None:
        self.first_token = Histogram(
            "phi4_first_token_seconds",
            "Seconds from a request to its first token, including queueing.",
            buckets=_FIRST_TOKEN_SECONDS,
            registry=None,
        )
        self.between_tokens = Histogram(
            "phi4_between_tokens_seconds",
            "Seconds between two tokens of a sample.",
            buckets=_BETWEEN_TOKENS_SECONDS,
            registry=None,
        )
        self.rate = TokenRate()
