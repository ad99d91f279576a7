"""Search many questions concurrently over one sampler.

Questions wait concurrently, and all their requests go to the sampler at once. Grading runs in a
thread of its own, so that the model samples while a sandbox runs programs. Neither affects the
results: a block's content depends on its seed alone.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import NamedTuple

from phi4.pts.search.drawing import AskedBlock, BlockDrawing
from phi4.pts.search.question import QuestionFound, search_question
from phi4.pts.search.rollouts import Rollout, RolloutBlock
from phi4.pts.search.settings import SearchSettings
from phi4.pts.search.store import SearchStore, StoredBlock
from phi4.sampling.batch import MAX_OPEN
from phi4.sampling.protocol import Completion, Sampler
from phi4.sampling.questions import KeyedQuestion

MAX_QUESTIONS = 256
"""Number of questions that are searched at once."""

_POLL_SECONDS = 0.05
"""Interval of sampler calls while only grades are pending: its other ranks must be called
regularly."""


class _OpenQuestion:
    """A question, and the blocks that it waits for."""

    def __init__(self, question: KeyedQuestion, settings: SearchSettings) -> None:
        self.question = question
        self.found: QuestionFound | None = None
        self._searching = search_question(settings)
        self._ask(next(self._searching))

    def take(self, index: int, rollouts: tuple[Rollout, ...]) -> None:
        """Store the result of a block; after the last one, advance to the next blocks or the
        end."""
        self._rollouts[index] = rollouts
        if len(self._rollouts) < len(self.blocks):
            return
        try:
            self._ask(self._searching.send([self._rollouts[i] for i in range(len(self.blocks))]))
        except StopIteration as stop:
            self.found = stop.value

    def _ask(self, blocks: Sequence[RolloutBlock]) -> None:
        self.blocks = blocks
        self._rollouts: dict[int, tuple[Rollout, ...]] = {}


class _Wanted(NamedTuple):
    """A block of an open question, with its index among the blocks that it waits for."""

    of: _OpenQuestion
    place: int

    @property
    def asked(self) -> AskedBlock:
        return AskedBlock(self.of.question, self.of.blocks[self.place])


class SearchRun:
    """Searches questions until all have ended.

    Args:
        sampler: the sampler, used exclusively.
        drawing: makes requests and grades.
        store: stored blocks are not sampled again; new ones are stored.
        settings: settings of the search.
        finished: called with the result of a question, in the order in which they end.
    """

    def __init__(
        self,
        sampler: Sampler,
        drawing: BlockDrawing,
        store: SearchStore,
        settings: SearchSettings,
        finished: Callable[[KeyedQuestion, QuestionFound], None],
    ) -> None:
        self._sampler, self._drawing, self._store = sampler, drawing, store
        self._settings, self._finished = settings, finished
        self._num_open = 0
        self._waiting: deque[_Wanted] = deque()
        self._in_flight: dict[int, tuple[_Wanted, list[Completion]]] = {}
        self._drawn: list[tuple[_Wanted, list[Completion]]] = []

    def run(self, questions: Iterable[KeyedQuestion]) -> None:
        """Search all questions.

        Raises:
            SamplerError: the model failed; stored blocks are not sampled again.
        """
        coming = iter(questions)
        with ThreadPoolExecutor(1) as grader:
            grading: Future[list[tuple[Rollout, ...]]] | None = None
            batch: list[tuple[_Wanted, list[Completion]]] = []
            while True:
                self._open(coming)
                if not self._num_open:
                    return
                self._draw()
                if grading is None and self._drawn:
                    batch, self._drawn = self._drawn, []
                    pairs = [(wanted.asked, completions) for wanted, completions in batch]
                    grading = grader.submit(self._drawing.graded, pairs)
                if grading is not None and not self._in_flight:
                    wait([grading], _POLL_SECONDS)
                if grading is not None and grading.done():
                    self._store_batch([wanted for wanted, _ in batch], grading.result())
                    grading = None

    def _open(self, coming: Iterator[KeyedQuestion]) -> None:
        while self._num_open < MAX_QUESTIONS:
            question = next(coming, None)
            if question is None:
                return
            self._num_open += 1
            self._ask(_OpenQuestion(question, self._settings))

    def _ask(self, one: _OpenQuestion) -> None:
        """Queue a question's blocks that are not stored; advance as long as all are stored."""
        while one.found is None:
            blocks = one.blocks
            stored = [self._store.rollouts(one.question.prompt, block) for block in blocks]
            self._waiting += [
                _Wanted(one, index) for index, found in enumerate(stored) if found is None
            ]
            for index, found in enumerate(stored):
                if found is not None:
                    one.take(index, found)
            if one.found is None and one.blocks is blocks:
                return
        self._num_open -= 1
        self._finished(one.question, one.found)

    def _draw(self) -> None:
        """Submit queued blocks, and take one step of the sampler."""
        while self._waiting and len(self._in_flight) < MAX_OPEN:
            wanted = self._waiting.popleft()
            request_id = self._sampler.submit(self._drawing.request(wanted.asked))
            self._in_flight[request_id] = (wanted, [])
        for event in self._sampler.step():
            if not isinstance(event, Completion):
                continue
            wanted, completions = self._in_flight[event.request_id]
            completions.append(event)
            if len(completions) == wanted.asked.block.n:
                del self._in_flight[event.request_id]
                completions.sort(key=lambda completion: completion.sample)
                self._drawn.append((wanted, completions))

    def _store_batch(self, batch: Sequence[_Wanted], graded: Sequence[tuple[Rollout, ...]]) -> None:
        self._store.save(
            StoredBlock(
                wanted.of.question.prompt,
                wanted.asked.block,
                self._drawing.request(wanted.asked).seed,
                rollouts,
            )
            for wanted, rollouts in zip(batch, graded, strict=True)
        )
        for wanted, rollouts in zip(batch, graded, strict=True):
            blocks = wanted.of.blocks
            wanted.of.take(wanted.place, rollouts)
            if wanted.of.blocks is not blocks or wanted.of.found is not None:
                self._ask(wanted.of)
