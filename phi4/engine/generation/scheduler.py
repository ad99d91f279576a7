"""Continuous batching: which tokens of which requests the next step computes. No tensors, no ranks.

A step has a budget of tokens. Samples that are being drawn come first, one token each, those that
have waited longest before others; what is left of the budget goes to prompts, in chunks, in the
order of submission. A request waits until the pool has room for all of it, and does not overtake.
Every rank runs the same scheduler on the same requests, so no plan has to be sent.
"""

from collections import deque
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from phi4.engine.generation.blocks import BlockCopy, BlockPool, CachedSequence
from phi4.engine.generation.decode import Step, StepRow
from phi4.engine.generation.draws import Draw, Drawn
from phi4.engine.generation.request import GenerationRequest

FinishReason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True)
class PromptScored:
    """The scores of a prompt's tokens from the second one on."""

    request_id: int
    tokens: Sequence[Drawn]


@dataclass(frozen=True)
class TokenDrawn:
    """A sample grew by one token."""

    request_id: int
    sample: int
    drawn: Drawn


@dataclass(frozen=True)
class SampleEnded:
    """A sample ended; every one of a request does, exactly once."""

    request_id: int
    sample: int
    reason: FinishReason


Event = PromptScored | TokenDrawn | SampleEnded


@dataclass(frozen=True)
class StepLimits:
    """How much one step computes.

    Attributes:
        tokens: new tokens of all rows together.
        scored_tokens: those of them whose logits are made to score a prompt.
    """

    tokens: int = 512
    scored_tokens: int = 64


@dataclass(eq=False)
class _Sample:
    """A sample that is being drawn; before its first token, the prompt of all samples."""

    request_id: int
    request: GenerationRequest
    index: int
    sequence: CachedSequence
    num_drawn: int = 0
    last: int = 0
    scores: list[Drawn] = field(default_factory=list)

    def draw(self, sample: int) -> Draw:
        """How its next token is chosen."""
        request, position = self.request, self.num_drawn
        forced = request.forced[position] if position < len(request.forced) else None
        return Draw(
            seed=request.seed,
            sample=sample,
            position=position,
            temperature=request.temperature,
            top_k=request.top_k,
            top_p=request.top_p,
            min_p=request.min_p,
            logit_bias=request.logit_bias,
            forbidden=frozenset(request.forbidden_first) if position == 0 else frozenset(),
            forced=forced,
            num_top=request.num_top_log_probs,
        )


class Scheduler:
    """The requests of one replica.

    Args:
        pool: the blocks of the cache.
        limits: of a step.
        weights_key: of the model's weights; see `BlockPool.admit`.
    """

    def __init__(self, pool: BlockPool, limits: StepLimits, weights_key: Hashable) -> None:
        self._pool, self._limits, self._weights_key = pool, limits, weights_key
        self._waiting: deque[tuple[int, GenerationRequest]] = deque()
        self._prompts: deque[_Sample] = deque()
        self._samples: deque[_Sample] = deque()
        self._planned: list[_Sample] = []
        self._cancelled: list[Event] = []

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to compute and nothing to report."""
        return not (self._waiting or self._prompts or self._samples or self._cancelled)

    def submit(self, request_id: int, request: GenerationRequest) -> None:
        """Queue a request that `check_request` has accepted.

        Raises:
            ConfigError: the cache could never hold it.
        """
        self._pool.check_fits(len(request.prompt), request.n, request.max_tokens)
        self._waiting.append((request_id, request))

    def cancel(self, request_id: int, sample: int | None = None) -> None:
        """End one sample that is being drawn, or without it all unfinished ones of a request.

        The next `finish` reports them. What has ended already is left alone.

        Raises:
            ValueError: a planned step has not been finished.
        """
        self._check_nothing_planned()
        if sample is None:
            waiting = [entry for entry in self._waiting if entry[0] == request_id]
            for entry in waiting:
                self._waiting.remove(entry)
                self._report_cancelled(request_id, range(entry[1].n))
            for prompt in [one for one in self._prompts if one.request_id == request_id]:
                self._prompts.remove(prompt)
                self._pool.end(prompt.sequence)
                self._report_cancelled(request_id, range(prompt.request.n))
        for one in [one for one in self._samples if one.request_id == request_id]:
            if sample in (None, one.index):
                self._samples.remove(one)
                self._pool.end(one.sequence)
                self._report_cancelled(request_id, (one.index,))

    def reload(self, weights_key: Hashable) -> None:
        """Forget all prefixes: the weights are others now."""
        self._weights_key = weights_key
        self._pool.forget()

    def plan(self) -> Step:
        """The next step; without rows when there is nothing to compute.

        Raises:
            ValueError: the last step has not been finished.
        """
        self._check_nothing_planned()
        budget, scored_budget = self._limits.tokens, self._limits.scored_tokens
        rows: list[tuple[_Sample, StepRow, BlockCopy | None]] = []
        for _ in range(min(budget, len(self._samples))):
            sample = self._samples.popleft()
            self._samples.append(sample)
            rows.append(self._row(sample, [sample.last], [sample.draw(sample.index)], ()))
        budget -= len(rows)
        for prompt in self._admitted():
            if budget <= 0:
                break
            count = min(budget, len(prompt.request.prompt) - len(prompt.sequence.tokens))
            if prompt.request.prompt_log_probs:
                count = min(count, scored_budget)
                scored_budget -= count
            if count:
                rows.append(self._chunk(prompt, count))
            budget -= count
        rows.sort(key=lambda entry: (len(entry[1].tokens) > 1, len(entry[1].slots)))
        self._planned = [sample for sample, _, _ in rows]
        return Step([row for _, row, _ in rows], [copy for _, _, copy in rows if copy])

    def finish(self, drawn: Sequence[Sequence[Drawn]]) -> list[Event]:
        """What happened: the results of the planned step by row, and cancelled samples.

        Args:
            drawn: as `Decoder.run` returns them.
        """
        planned, self._planned = self._planned, []
        events, self._cancelled = self._cancelled, []
        for sample, results in zip(planned, drawn, strict=True):
            self._pool.publish(sample.sequence)
            if sample.num_drawn:
                events += self._grown(sample, results[0])
            else:
                events += self._prompt_computed(sample, results)
        return events

    def _check_nothing_planned(self) -> None:
        if self._planned:
            raise ValueError("the last planned step has not been finished")

    def _admitted(self) -> Sequence[_Sample]:
        """Prompts to compute, those that now fit included."""
        while self._waiting and len(self._prompts) < self._limits.tokens:
            request_id, request = self._waiting[0]
            sequence = self._pool.admit(
                request.prompt,
                num_samples=request.n,
                max_new_tokens=request.max_tokens,
                weights_key=self._weights_key,
                reuses=not request.prompt_log_probs,
            )
            if sequence is None:
                break
            self._waiting.popleft()
            self._prompts.append(_Sample(request_id, request, 0, sequence))
        return tuple(self._prompts)

    def _chunk(self, prompt: _Sample, count: int) -> tuple[_Sample, StepRow, BlockCopy | None]:
        request, start = prompt.request, len(prompt.sequence.tokens)
        tokens = request.prompt[start : start + count]
        is_last = start + count == len(request.prompt)
        draws = [prompt.draw(i) for i in range(request.n)] if is_last and request.max_tokens else ()
        scored = ()
        if request.prompt_log_probs:
            num_top = request.num_top_log_probs
            following = request.prompt[start + 1 : start + count + 1]
            scored = [Draw(0, temperature=0.0, forced=i, num_top=num_top) for i in following]
        return self._row(prompt, tokens, draws, scored)

    def _row(
        self,
        sample: _Sample,
        tokens: Sequence[int],
        draws: Sequence[Draw],
        scored: Sequence[Draw],
    ) -> tuple[_Sample, StepRow, BlockCopy | None]:
        copy = self._pool.extend(sample.sequence, tokens)
        slots = self._pool.slots(sample.sequence, 0, len(sample.sequence.tokens))
        return sample, StepRow(tokens, slots, draws, scored), copy

    def _prompt_computed(self, prompt: _Sample, results: Sequence[Drawn]) -> list[Event]:
        """After a chunk; at the prompt's end its samples begin."""
        request, events = prompt.request, []
        is_last = len(prompt.sequence.tokens) == len(request.prompt)
        num_drawn = request.n if is_last and request.max_tokens else 0
        prompt.scores += results[: len(results) - num_drawn]
        if not is_last:
            return events
        self._prompts.remove(prompt)
        if request.prompt_log_probs:
            events.append(PromptScored(prompt.request_id, tuple(prompt.scores)))
        if not request.max_tokens:
            self._pool.end(prompt.sequence)
            ids = range(request.n)
            return events + [SampleEnded(prompt.request_id, i, "length") for i in ids]
        sequences = [
            prompt.sequence,
            *(self._pool.fork(prompt.sequence) for _ in range(1, request.n)),
        ]
        for i, sequence in enumerate(sequences):
            sample = _Sample(prompt.request_id, request, i, sequence)
            self._samples.append(sample)
            events += self._grown(sample, results[len(results) - num_drawn + i])
        return events

    def _grown(self, sample: _Sample, drawn: Drawn) -> list[Event]:
        request = sample.request
        sample.last, sample.num_drawn = drawn.token, sample.num_drawn + 1
        events: list[Event] = [TokenDrawn(sample.request_id, sample.index, drawn)]
        is_stop = drawn.token in request.stop_ids
        if is_stop or sample.num_drawn == request.max_tokens:
            self._samples.remove(sample)
            self._pool.end(sample.sequence)
            reason: FinishReason = "stop" if is_stop else "length"
            events.append(SampleEnded(sample.request_id, sample.index, reason))
        return events

    def _report_cancelled(self, request_id: int, samples: Sequence[int]) -> None:
        self._cancelled += [SampleEnded(request_id, i, "cancelled") for i in samples]
