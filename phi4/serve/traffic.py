"""Route all requests of a server through one sampler.

A sampler has one thread, the model's, which runs `Traffic.run`. Everything else is on the server's
event loop, and submits requests and receives events through `Traffic.ask`. A request that no client
waits for is cancelled before the next step.
"""

import asyncio
import queue
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from phi4.errors import ConfigError, SamplerError
from phi4.sampling.protocol import (
    Completion,
    Event,
    NewToken,
    ReportsLoad,
    Request,
    Sampler,
)
from phi4.serve.api_errors import (
    UNAVAILABLE,
    ApiError,
    ErrorType,
    bad_request,
    shutting_down,
)
from phi4.serve.counts import TrafficCounts, TrafficLoad
from phi4.serve.letters import AskedRequest, Letter, post
from phi4.serve.timing import Timing

IDLE_SECONDS = 0.2
"""Longest pause between two steps, because the other ranks of the model wait in them."""

_RETRY_SECONDS = 5
"""Value of Retry-After; the remaining time of the open requests is unknown."""


@dataclass(frozen=True)
class ModelChange:
    """A change of the model between requests, such as other weights.

    Attributes:
        apply: called on the model's thread while no request is in progress. Returns the new name of
            the model's weights, or None if they are unchanged.
    """

    apply: Callable[[], str | None]


class Traffic:
    """Accepts requests on the event loop and answers them on the model's thread.

    Args:
        weights: as above, or as renamed by the last change.
        max_open: maximum number of accepted requests; more are rejected with 429.
        drain_seconds: time for open requests to finish after `drain`.

    Attributes:
        weights: as above, or what the last change named.
        num_open: requests that are accepted and have not ended.
        counts: counters of this server. `refused` is written by the loop, the rest by the model's
            thread.
        load: load as of the last step.
        timing: token timing.
        is_draining: whether no more requests are accepted.
    """

    def __init__(self, weights: str, max_open: int = 1024, drain_seconds: float = 20.0) -> None:
        self.weights = weights
        self.num_open = 0
        self.counts = TrafficCounts()
        self.load = TrafficLoad()
        self.timing = Timing()
        self.is_draining = False
        self._max_open, self._drain_seconds = max_open, drain_seconds
        self._orders: queue.SimpleQueue[AskedRequest | ModelChange | None] = queue.SimpleQueue()
        self._intake = threading.Lock()
        self._waiting: deque[AskedRequest] = deque()
        self._change: ModelChange | None = None
        self._under_way: dict[int, AskedRequest] = {}
        self._drain_ends: float | None = None

    async def ask(
        self, requests: Sequence[Request]
    ) -> AsyncGenerator[tuple[int, Sequence[Event]], None]:
        """Yield events, each with the index of its request, until all have ended.

        Closing the generator cancels unfinished requests.

        Raises:
            ApiError: 429 if too many requests are open, 503 if the server is shutting down, 400 for
                a request that the model rejects, 500 for one that it failed on. The other requests
                are then cancelled.
        """
        loop, mailbox, now = asyncio.get_running_loop(), asyncio.Queue[Letter](), time.monotonic()
        asked = [AskedRequest(i, one, loop, mailbox, one.n, now) for i, one in enumerate(requests)]
        # If the model ended in between, they would wait for ever.
        with self._intake:
            self._admit(len(asked))
            for one in asked:
                self._orders.put(one)
        try:
            num_left = len(asked)
            while num_left:
                if not mailbox.empty():
                    # No await follows below: let other tasks run, and detect a disconnected client.
                    await asyncio.sleep(0)
                letter = await mailbox.get()
                if isinstance(letter.content, ApiError):
                    raise letter.content
                num_left -= letter.is_last
                yield letter.place, letter.content
        finally:
            self.num_open -= len(asked)
            for one in asked:
                one.is_abandoned = True

    def change(self, change: ModelChange) -> None:
        """Apply a change once the requests in progress have ended; new ones wait for it meanwhile.

        Thread-safe. A pending change is replaced by a newer one, or by a drain.
        """
        self._orders.put(change)

    def drain(self) -> None:
        """Accept no more requests, and let `run` return once the open ones have ended.

        Thread-safe, and safe in a signal handler.
        """
        self.is_draining = True
        # Wakes a wait for orders.
        self._orders.put(None)

    def run(self, sampler: Sampler) -> None:
        """Answer requests until drained; on the model's thread.

        If it raises anything other than a SamplerError, all open requests have failed and no more
        are accepted.
        """
        error = ApiError(500, "the model failed; the server ends", kind=ErrorType.SERVER)
        try:
            self._note_load(sampler)
            while not self._is_drained():
                self._cancel_abandoned(sampler)
                self._begin_waiting(sampler)
                try:
                    self._deliver(sampler.step())
                except SamplerError as failure:
                    self._fail(failure)
                self._note_load(sampler)
            error = shutting_down()
        finally:
            self._close(error)

    def _admit(self, count: int) -> None:
        """Count some requests as open, on the loop.

        Raises:
            ApiError: there are too many.
        """
        if self.is_draining:
            self.counts.refused += count
            raise shutting_down()
        if count > self._max_open:
            raise bad_request(f"{count} prompts in a request; expected at most {self._max_open}")
        if self.num_open + count > self._max_open:
            self.counts.refused += count
            raise ApiError(
                429,
                f"{self.num_open} requests are open, the limit is {self._max_open}; retry later",
                kind=ErrorType.RATE_LIMIT,
                code="rate_limit_exceeded",
                retry_seconds=_RETRY_SECONDS,
            )
        self.num_open += count

    def _take_orders(self) -> None:
        """Return orders since the last step; wait briefly if there is nothing else to do."""
        is_idle = not (self._under_way or self._waiting or self._change or self.is_draining)
        with suppress(queue.Empty):
            order = self._orders.get(is_idle, IDLE_SECONDS)
            while True:
                match order:
                    case ModelChange():
                        self._change = order
                    case AskedRequest():
                        self._waiting.append(order)
                order = self._orders.get_nowait()

    def _is_drained(self) -> bool:
        """Process orders; return whether nothing is left to do and nothing will arrive."""
        self._take_orders()
        if not self.is_draining:
            return False
        self._change = None
        now = time.monotonic()
        if self._drain_ends is None:
            self._drain_ends = now + self._drain_seconds
        if now >= self._drain_ends:
            self._abandon_all(shutting_down())
        return not self._under_way and not self._waiting

    def _abandon_all(self, error: ApiError) -> None:
        """Fail all waiting requests."""
        left = [one for one in (*self._waiting, *self._under_way.values()) if not one.is_abandoned]
        post([(one, Letter(one.index, error, True)) for one in left])
        for one in left:
            one.is_abandoned = True

    def _close(self, error: ApiError) -> None:
        """Accept nothing more; fail remaining and late requests."""
        with self._intake:
            self.is_draining = True
        self._take_orders()
        for one in (*self._waiting, *self._under_way.values()):
            if one.is_abandoned or error.status == UNAVAILABLE:
                self.counts.cancelled += 1
            else:
                self.counts.failed += 1
        self._abandon_all(error)
        self._waiting.clear()
        self._under_way.clear()
        self.load = TrafficLoad()

    def _note_load(self, sampler: Sampler) -> None:
        said = sampler.load() if isinstance(sampler, ReportsLoad) else None
        self.load = TrafficLoad(len(self._waiting), len(self._under_way), said)

    def _cancel_abandoned(self, sampler: Sampler) -> None:
        for request_id, one in self._under_way.items():
            if one.is_abandoned and not one.is_cancelled:
                one.is_cancelled = True
                sampler.cancel(request_id)
        left = [one for one in self._waiting if not one.is_abandoned]
        self.counts.cancelled += len(self._waiting) - len(left)
        self._waiting = deque(left)

    def _begin_waiting(self, sampler: Sampler) -> None:
        """Submit waiting requests, unless a change has priority."""
        if self._change is not None:
            if self._under_way:
                return
            change, self._change = self._change, None
            weights = change.apply()
            if weights is not None:
                self.weights = weights
                self.counts.reloads += 1
        while self._waiting:
            one = self._waiting.popleft()
            try:
                request_id = sampler.submit(one.request)
            except ConfigError as error:
                self.counts.failed += 1
                post([(one, Letter(one.index, bad_request(str(error)), True))])
                continue
            self.counts.prompt_tokens += len(one.request.prompt)
            self._under_way[request_id] = one

    def _deliver(self, events: Sequence[Event]) -> None:
        """Deliver the events of a step to their requests."""
        by_request: dict[int, list[Event]] = {}
        for event in events:
            by_request.setdefault(event.request_id, []).append(event)
        letters = []
        for request_id, happened in by_request.items():
            one = self._under_way[request_id]
            self._count_tokens(one, happened)
            one.num_left -= sum(isinstance(event, Completion) for event in happened)
            letters.append((one, Letter(one.index, happened, one.num_left == 0)))
            if one.num_left == 0:
                del self._under_way[request_id]
                self.counts.cancelled += one.is_abandoned
                self.counts.completed += not one.is_abandoned
        post(letters)

    def _count_tokens(self, one: AskedRequest, happened: Sequence[Event]) -> None:
        now, num_tokens = time.monotonic(), 0
        for event in happened:
            if isinstance(event, NewToken):
                before = one.token_at.get(event.sample)
                if before is not None:
                    self.timing.between_tokens.observe(now - before)
                elif not one.token_at:
                    self.timing.first_token.observe(now - one.asked_at)
                one.token_at[event.sample] = now
                num_tokens += 1
        self.counts.new_tokens += num_tokens
        self.timing.rate.add(num_tokens)

    def _fail(self, error: SamplerError) -> None:
        one = self._under_way.pop(error.request_id)
        self.counts.failed += 1
        failure = ApiError(500, str(error), kind=ErrorType.SERVER)
        post([(one, Letter(one.index, failure, True))])
