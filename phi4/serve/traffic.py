"""All requests of a server through one sampler.

One decision: a sampler has one thread, that of the model, which runs `Traffic.run`. Everything else
is on the server's event loop, and hands over requests and takes what happens through `Traffic.ask`.
A request that nobody waits for any more is cancelled before the next step.
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
from phi4.serve.api_errors import ApiError, ErrorType, bad_request
from phi4.serve.counts import TrafficCounts, TrafficLoad
from phi4.serve.letters import AskedRequest, Letter, post
from phi4.serve.timing import Timing

IDLE_SECONDS = 0.2
"""Longest pause between two steps: the other ranks of the model wait for this one in them."""

_UNAVAILABLE = 503
_RETRY_SECONDS = 5
"""What Retry-After says; nothing is known of how long the open requests take."""


@dataclass(frozen=True)
class ModelChange:
    """Something done to the model between requests, such as other weights.

    Attributes:
        apply: called on the model's thread while no request is under way. It returns the name of
            the model's weights from then on, or None where they are as before.
    """

    apply: Callable[[], str | None]


class Traffic:
    """Takes requests on the event loop and answers them on the model's thread.

    Args:
        weights: name of the model's weights.
        max_open: requests that are taken at once; more are refused with 429.
        drain_seconds: what open requests have to end in after `drain`.

    Attributes:
        weights: as above, or what the last change named.
        num_open: requests that are taken and have not ended.
        counts: of this server so far. `refused` is written by the loop, the rest by the model's
            thread.
        load: as of the last step.
        timing: of tokens.
        is_draining: whether no more requests are taken.
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
        """Yield what happens, each time with the index of its request, until all have ended.

        Closing the generator cancels what has not ended.

        Raises:
            ApiError: 429 where too many requests are open, 503 where the server is about to end,
                400 for a request that the model refuses, 500 for one that it failed on. The other
                requests are cancelled then.
        """
        loop, mailbox, now = asyncio.get_running_loop(), asyncio.Queue[Letter](), time.monotonic()
        asked = [AskedRequest(i, one, loop, mailbox, one.n, now) for i, one in enumerate(requests)]
        # A model that ends in between would leave them waiting for ever.
        with self._intake:
            self._admit(len(asked))
            for one in asked:
                self._orders.put(one)
        try:
            num_left = len(asked)
            while num_left:
                if not mailbox.empty():
                    # Nothing would wait below: others have their turn, and a client may have left.
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
        """Apply a change once the requests under way have ended; new ones wait for it meanwhile.

        From any thread. A change that still waits gives way to a newer one, or to a drain.
        """
        self._orders.put(change)

    def drain(self) -> None:
        """Take no more requests, and let `run` return once the open ones have ended.

        From any thread, and from a signal handler.
        """
        self.is_draining = True
        # Ends a wait for orders.
        self._orders.put(None)

    def run(self, sampler: Sampler) -> None:
        """Answer requests until drained; on the model's thread.

        Whatever else than a SamplerError it raises, all open requests have failed then, and no more
        are taken.
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
            error = _shutting_down()
        finally:
            self._close(error)

    def _admit(self, count: int) -> None:
        """Count some requests as open, on the loop.

        Raises:
            ApiError: there is no room for them.
        """
        if self.is_draining:
            self.counts.refused += count
            raise _shutting_down()
        if count > self._max_open:
            raise bad_request(f"{count} prompts in a request; expected at most {self._max_open}")
        if self.num_open + count > self._max_open:
            self.counts.refused += count
            raise ApiError(
                429,
                f"{self.num_open} requests are open, of at most {self._max_open}; ask again later",
                kind=ErrorType.RATE_LIMIT,
                code="rate_limit_exceeded",
                retry_seconds=_RETRY_SECONDS,
            )
        self.num_open += count

    def _take_orders(self) -> None:
        """What came since the last step; waits a little where there is nothing else to do."""
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
        """Take what came; whether nothing is left to do, and nothing will come."""
        self._take_orders()
        if not self.is_draining:
            return False
        self._change = None
        now = time.monotonic()
        if self._drain_ends is None:
            self._drain_ends = now + self._drain_seconds
        if now >= self._drain_ends:
            self._abandon_all(_shutting_down())
        return not self._under_way and not self._waiting

    def _abandon_all(self, error: ApiError) -> None:
        """Tell all who wait that it was in vain."""
        left = [one for one in (*self._waiting, *self._under_way.values()) if not one.is_abandoned]
        post([(one, Letter(one.index, error, True)) for one in left])
        for one in left:
            one.is_abandoned = True

    def _close(self, error: ApiError) -> None:
        """Take nothing any more; what is left, or came in the last moment, is told so."""
        with self._intake:
            self.is_draining = True
        self._take_orders()
        for one in (*self._waiting, *self._under_way.values()):
            if one.is_abandoned or error.status == _UNAVAILABLE:
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
        """Hand over what waits, unless a change is to be made before."""
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
        """Give every request what happened to it in a step."""
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


def _shutting_down() -> ApiError:
    return ApiError(
        _UNAVAILABLE, "the server is shutting down; ask another one", kind=ErrorType.SERVER
    )
