"""Requests through one sampler: all are answered, refused or cancelled, and none is forgotten."""

import asyncio
import random
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import astuple, replace

import pytest

from phi4.data.vocabulary.tokenizer import Tokenizer
from phi4.sampling.protocol import Completion, Event, FinishReason, NewToken, Request
from phi4.serve.api_errors import ApiError
from phi4.serve.counts import TrafficLoad
from phi4.serve.traffic import ModelChange, Traffic
from tests.support.unhurried import UnhurriedSampler
from tests.support.waiting import LONG_SECONDS, wait_until

TOKENIZER = Tokenizer({bytes([value]): value for value in range(256)})
ENDLESS = 1 << 30
FAILS = 66
"""A prompt that begins with this id is answered for two tokens, and fails then."""


def script(ids: tuple[int, ...]) -> dict[int, float]:
    return {} if ids[0] == FAILS and len(ids) > 3 else {65: 1.0}


class Model:
    """Traffic, its sampler and the model's thread.

    Attributes:
        died: what the thread ended with, if not by a drain.
    """

    def __init__(self, sampler: UnhurriedSampler, max_open: int, drain_seconds: float) -> None:
        self.sampler, self.died = sampler, None
        self.traffic = Traffic("weights", max_open, drain_seconds)
        self.thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        try:
            self.traffic.run(self.sampler)
        except ArithmeticError as error:
            self.died = error


@contextmanager
def running(
    max_open: int = 8, drain_seconds: float = 0.0, sampler: UnhurriedSampler | None = None
) -> Iterator[Model]:
    """A model that repeats one letter for ever."""
    model = Model(sampler or UnhurriedSampler(script, TOKENIZER), max_open, drain_seconds)
    model.thread.start()
    try:
        yield model
    finally:
        model.traffic.drain()
        model.thread.join()
    assert model.traffic.load == TrafficLoad()


async def texts_of(traffic: Traffic, *requests: Request) -> list[list[int]]:
    ids: list[list[int]] = [[] for _ in requests]
    async for index, happened in traffic.ask(requests):
        for event in happened:
            if isinstance(event, Completion):
                ids[index] += [token.id for token in event.tokens]
    return ids


def refusal_of(traffic: Traffic, *requests: Request) -> ApiError:
    with pytest.raises(ApiError) as caught:
        asyncio.run(texts_of(traffic, *requests))
    return caught.value


async def until_left(traffic: Traffic, leaves: Callable[[], bool]) -> None:
    """An endless request whose client leaves some time."""
    endless = Request(prompt=(1,), max_tokens=ENDLESS)
    async with aclosing(traffic.ask([endless])) as asked:
        async for _ in asked:
            if leaves():
                return


@contextmanager
def open_request(traffic: Traffic) -> Iterator[None]:
    """An endless request is under way while the block runs."""
    began, leaves = threading.Event(), threading.Event()

    def has_begun() -> bool:
        began.set()
        return leaves.is_set()

    client = threading.Thread(target=lambda: asyncio.run(until_left(traffic, has_begun)))
    client.start()
    began.wait()
    try:
        yield
    finally:
        leaves.set()
        client.join()


def test_requests_that_are_asked_together_are_answered_by_index() -> None:
    with running() as model:
        asked = [Request(prompt=(1,), max_tokens=count) for count in (3, 1, 2)]
        assert asyncio.run(texts_of(model.traffic, *asked)) == [[65] * 3, [65], [65] * 2]
        counts = model.traffic.counts
        assert (counts.completed, counts.new_tokens, model.traffic.num_open) == (3, 6, 0)


def test_too_many_open_requests_are_told_when_to_come_again() -> None:
    one = Request(prompt=(1,), max_tokens=1)
    with running(max_open=2) as model:
        with open_request(model.traffic):
            error = refusal_of(model.traffic, one, one)
            assert (error.status, error.code) == (429, "rate_limit_exceeded")
            assert error.retry_seconds == 5
            assert error.message == "1 requests are open, the limit is 2; retry later"
            assert asyncio.run(texts_of(model.traffic, one)) == [[65]]
        error = refusal_of(model.traffic, one, one, one)
        assert (error.status, error.message) == (400, "3 prompts in a request; expected at most 2")
        assert (model.traffic.counts.refused, model.traffic.num_open) == (2, 0)


def test_request_that_fails_ends_those_asked_with_it_and_no_others() -> None:
    with running() as model, open_request(model.traffic):
        good, bad = Request(prompt=(1,), max_tokens=ENDLESS), Request(prompt=(FAILS,), max_tokens=9)
        error = refusal_of(model.traffic, good, bad)
        assert error.status == 500 and "no entry" in error.message
        impossible = Request(prompt=(TOKENIZER.vocab_size,), max_tokens=1)
        assert refusal_of(model.traffic, good, impossible).status == 400
        counts = model.traffic.counts
        wait_until(lambda: counts.cancelled == 2, "the good ones are cancelled")
        assert (counts.failed, model.traffic.num_open) == (2, 1)


def test_change_waits_for_open_requests_and_new_ones_wait_for_it() -> None:
    applied = []
    with running() as model:
        traffic = model.traffic
        with open_request(traffic):
            for name in ("first", "second"):
                traffic.change(ModelChange(lambda name=name: applied.append(name) or name))
            waiting = threading.Thread(
                target=lambda: asyncio.run(texts_of(traffic, Request(prompt=(1,), max_tokens=1)))
            )
            waiting.start()
            wait_until(lambda: traffic.load.waiting == 1, "a request waits for the change")
            assert applied == [] and traffic.weights == "weights"
        waiting.join()
        # The one that still waited gave way.
        assert (applied, traffic.weights, traffic.counts.reloads) == (["second"], "second", 1)
        traffic.change(ModelChange(lambda: None))
        asyncio.run(texts_of(traffic, Request(prompt=(1,), max_tokens=1)))
        assert (traffic.weights, traffic.counts.reloads) == ("second", 1)


def test_drain_refuses_new_requests_ends_open_ones_in_time_and_changes_nothing() -> None:
    with running(drain_seconds=LONG_SECONDS) as model:
        traffic = model.traffic
        with open_request(traffic):
            traffic.change(ModelChange(lambda: "changed in a drain"))
            waiting = threading.Thread(
                target=lambda: asyncio.run(texts_of(traffic, Request(prompt=(1,), max_tokens=1)))
            )
            waiting.start()
            wait_until(lambda: traffic.load.waiting == 1, "a request waits for the change")
            assert traffic.num_open == 2
            traffic.drain()
            error = refusal_of(traffic, Request(prompt=(1,), max_tokens=1))
            assert (error.status, traffic.counts.refused) == (503, 1)
        waiting.join()
        model.thread.join()
        assert (traffic.counts.completed, traffic.counts.cancelled, traffic.num_open) == (1, 1, 0)
        assert traffic.weights == "weights"


def test_requests_that_outlive_a_drain_are_told_so() -> None:
    with running(drain_seconds=0.0) as model:
        began = threading.Event()

        def drains() -> bool:
            if not began.is_set():
                began.set()
                model.traffic.drain()
            return False

        with pytest.raises(ApiError, match="the server is shutting down") as caught:
            asyncio.run(until_left(model.traffic, drains))
        model.thread.join()
        assert (caught.value.status, model.traffic.counts.cancelled) == (503, 1)
        assert not model.sampler._open


class NotedLock:
    """A lock that says when a thread that is not the loop's wants it."""

    def __init__(self) -> None:
        self._lock, self.is_wanted, self._owner = threading.Lock(), False, threading.get_ident()

    def __enter__(self) -> None:
        self.is_wanted = self.is_wanted or threading.get_ident() != self._owner
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()


def test_request_that_is_taken_while_the_model_ends_is_answered() -> None:
    with running() as model:
        traffic, lock = model.traffic, NotedLock()
        admit, traffic._intake = traffic._admit, lock

        def admit_at_the_end(count: int) -> None:
            admit(count)
            traffic.drain()
            wait_until(lambda: lock.is_wanted or not model.thread.is_alive(), "the model ends")

        traffic._admit = admit_at_the_end
        assert refusal_of(traffic, Request(prompt=(1,), max_tokens=1)).status == 503
        assert (traffic.num_open, traffic.counts.cancelled) == (0, 1)


class DyingSampler(UnhurriedSampler):
    """Breaks in its third step with requests."""

    num_steps = 0

    def step(self) -> Sequence[Event]:
        self.num_steps += bool(self._open)
        if self.num_steps == 3:
            raise ZeroDivisionError("broken")
        return super().step()


def test_model_that_breaks_leaves_nobody_waiting() -> None:
    with running(sampler=DyingSampler(script, TOKENIZER)) as model:
        endless = Request(prompt=(1,), max_tokens=ENDLESS)
        error = refusal_of(model.traffic, endless)
        assert (error.status, error.message) == (500, "the model failed; the server ends")
        model.thread.join()
        assert isinstance(model.died, ZeroDivisionError)
        assert refusal_of(model.traffic, endless).status == 503
        assert (model.traffic.counts.failed, model.traffic.num_open) == (1, 0)


def test_loop_that_was_closed_takes_nothing_from_others() -> None:
    with running() as model:
        asked = model.traffic.ask([Request(prompt=(1,), max_tokens=ENDLESS)])
        loop = asyncio.new_event_loop()
        loop.run_until_complete(anext(asked))
        loop.close()
        other = Request(prompt=(1,), max_tokens=3)
        assert asyncio.run(texts_of(model.traffic, other)) == [[65] * 3]


def test_client_that_reads_nothing_holds_no_more_than_its_tokens() -> None:
    num_turns = 0

    async def take_turns() -> None:
        nonlocal num_turns
        while True:
            num_turns += 1
            await asyncio.sleep(0)

    async def read_late(traffic: Traffic) -> tuple[int, int]:
        """Letters that wait when the model is done, and tokens in them."""
        asked = traffic.ask([Request(prompt=(1,), max_tokens=50, n=2)])
        tokens = [e for e in (await anext(asked))[1] if isinstance(e, NewToken)]
        while not traffic.counts.completed:
            await asyncio.sleep(0)
        other, before = asyncio.create_task(take_turns()), num_turns
        letters = [letter async for letter in asked]
        other.cancel()
        # Who catches up leaves the loop to others in between.
        assert num_turns - before >= len(letters) - 1
        tokens += [e for _, happened in letters for e in happened if isinstance(e, NewToken)]
        return len(letters), len(tokens)

    with running() as model:
        assert asyncio.run(read_late(model.traffic)) == (49, 100)


@pytest.mark.parametrize("seed", range(12))
def test_every_request_ends_and_is_counted_once(seed: int) -> None:
    draws = random.Random(seed)
    drain_seconds = draws.choice((0.0, LONG_SECONDS))
    outcomes: Counter[str] = Counter()
    with running(max_open=30, drain_seconds=drain_seconds) as model:
        asyncio.run(asyncio.wait_for(crowd(model, draws, outcomes), LONG_SECONDS))
        model.thread.join()
        counts = model.traffic.counts
        ended = (counts.completed, counts.cancelled, counts.failed, counts.refused)
        assert sum(ended) == outcomes["asked"] > 20
        # A drain refuses some, and ends others that were open.
        assert outcomes["429"] <= counts.refused <= outcomes["429"] + outcomes["503"]
        # Some that a client did not wait for to the end had ended.
        assert counts.completed >= outcomes["completed"]
        assert counts.failed <= outcomes["may fail"]
        assert counts.reloads <= outcomes["changes"]
        assert model.traffic.num_open == 0
        assert not model.sampler._open and not model.sampler.step()


async def crowd(model: Model, draws: random.Random, outcomes: Counter[str]) -> None:
    """Clients of all kinds, changes, and a drain while some are still there."""
    clients = []
    for index in range(40):
        clients.append(asyncio.create_task(client(model.traffic, draws, outcomes)))
        await asyncio.sleep(0.0005 * draws.randrange(4))
        if draws.random() < 0.2:
            outcomes["changes"] += 1
            name = draws.choice((None, f"step {index}"))
            model.traffic.change(ModelChange(lambda name=name: name))
        if index == 35:
            model.traffic.drain()
    await asyncio.gather(*clients)


async def client(traffic: Traffic, draws: random.Random, outcomes: Counter[str]) -> None:
    firsts = (1,) * 10 + (FAILS, TOKENIZER.vocab_size)
    requests = [
        Request(
            prompt=(draws.choice(firsts),),
            max_tokens=draws.randrange(1, 30),
            n=draws.randrange(1, 4),
        )
        for _ in range(draws.randrange(1, 4))
    ]
    outcomes["asked"] += len(requests)
    outcomes["may fail"] += sum(one.prompt[0] != 1 for one in requests)
    patience = draws.choice((0, 2, 10, ENDLESS))
    if patience < ENDLESS:
        requests[0] = replace(requests[0], max_tokens=ENDLESS)
    left = {(i, sample) for i, one in enumerate(requests) for sample in range(one.n)}
    try:
        async with aclosing(traffic.ask(requests)) as asked:
            async for index, happened in asked:
                for event in happened:
                    if isinstance(event, Completion):
                        assert event.finish_reason is FinishReason.LENGTH
                        assert len(event.tokens) == requests[index].max_tokens
                        left.remove((index, event.sample))
                patience -= 1
                if patience < 0:
                    return
            assert not left
            outcomes["completed"] += len(requests)
    except ApiError as error:
        assert error.status in (400, 429, 500, 503)
        outcomes[str(error.status)] += len(requests)


def test_counts_begin_at_nothing() -> None:
    assert set(astuple(Traffic("weights").counts)) == {0}
