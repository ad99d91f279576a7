"""Continuous batching: decide which tokens of which requests the next step computes. No tensors.

A step has a budget of tokens. Samples in progress come first, one token each, longest waiting
first; the rest of the budget goes to prompts, in chunks, in order of submission. A request waits
until the pool has space for all of it, and requests do not overtake each other. Every rank runs the
same scheduler on the same requests, so no plan has to be sent.

Several steps may be planned before the first of them is finished. A sample is in one of them at
most, since its next token depends on the last one; the chunks of a prompt may be in several.
"""

from collections import deque
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from phi4.engine.generation.blocks import BlockCopy, BlockPool, CachedSequence
from phi4.engine.generation.draws import Draw, Drawn
from phi4.engine.generation.events import (
    Event,
    FinishReason,
    PromptScored,
    SampleEnded,
    TokenDrawn,
)
from phi4.engine.generation.steps import Step, StepRow
from phi4.model.generation_request import GenerationRequest


@dataclass(frozen=True)
class StepLimits:
    """Limits of one step.

    Attributes:
        tokens: new tokens of all rows together.
        scored_tokens: those of them whose logits are computed to score a prompt.
    """

    tokens: int = 512
    scored_tokens: int = 64


@dataclass(eq=False, slots=True)
class _Sample:
    """A sample in progress; before its first token, it represents the prompt of all samples."""

    request_id: int
    request: GenerationRequest
    index: int
    sequence: CachedSequence
    num_drawn: int = 0
    last: int = 0
    scores: list[Drawn] = field(default_factory=list)
    is_planned: bool = False

    def draw(self, sample: int) -> Draw:
        """Sampling parameters of its next token."""
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


class _Planned(NamedTuple):
    """One row of a planned step."""

    sample: _Sample
    row: StepRow
    copy: BlockCopy | None
    ends_prompt: bool = False


class Scheduler:
    """The requests of one replica.

    Args:
        pool: the blocks of the cache.
        limits: limits of a step.
        weights_key: key of the model's weights; see `BlockPool.admit`.
        max_planned: maximum number of planned steps before the first of them is finished.
    """

    def __init__(
        self, pool: BlockPool, limits: StepLimits, weights_key: Hashable, max_planned: int = 1
    ) -> None:
        self._pool, self._limits, self._weights_key = pool, limits, weights_key
        self._max_planned = max_planned
        self._waiting: deque[tuple[int, GenerationRequest]] = deque()
        self._prompts: deque[_Sample] = deque()
        self._samples: deque[_Sample] = deque()
        self._planned: deque[Sequence[_Planned]] = deque()

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to compute and no step to finish."""
        return not (self._waiting or self._prompts or self._samples or self._planned)

    @property
    def num_waiting(self) -> int:
        """Requests that are waiting for space in the pool."""
        return len(self._waiting)

    def submit(self, request_id: int, request: GenerationRequest) -> None:
        """Queue a request that `check_generation_request` has accepted.

        Raises:
            ConfigError: the cache is too small for it.
        """
        self._pool.check_fits(len(request.prompt), request.n, request.max_tokens)
        self._waiting.append((request_id, request))

    def cancel(self, request_id: int, sample: int | None = None) -> list[Event]:
        """Cancel one sample in progress, or without it all unfinished ones of a request.

        Samples that have ended are unaffected. Blocks are freed at once: a planned step that still
        writes to them comes before any that reuses them.
        """
        events: list[Event] = []
        if sample is None:
            for entry in [entry for entry in self._waiting if entry[0] == request_id]:
                self._waiting.remove(entry)
                events += _cancelled(request_id, range(entry[1].n))
            for prompt in [one for one in self._prompts if one.request_id == request_id]:
                self._prompts.remove(prompt)
                self._pool.end(prompt.sequence)
                events += _cancelled(request_id, range(prompt.request.n))
        for one in [one for one in self._samples if one.request_id == request_id]:
            if sample in (None, one.index):
                self._samples.remove(one)
                self._pool.end(one.sequence)
                events += _cancelled(request_id, (one.index,))
        return events

    def reload(self, weights_key: Hashable) -> None:
        """Forget all prefixes after a change of the weights."""
        self._weights_key = weights_key
        self._pool.forget()

    def plan(self) -> Step:
        """Plan the next step; without rows if nothing can be computed yet.

        Raises:
            ValueError: max_planned steps have not been finished.
        """
        if len(self._planned) == self._max_planned:
            raise ValueError(f"{self._max_planned} planned steps have not been finished")
        planned = self._next_tokens()
        budget = self._limits.tokens - len(planned)
        planned += self._chunks(budget)
        # Samples of a prompt next to each other, so that they read it once.
        planned.sort(key=lambda one: (len(one.row.tokens) > 1, one.row.end, one.row.blocks[0]))
        if planned:
            self._planned.append(planned)
        return Step([one.row for one in planned], [one.copy for one in planned if one.copy])

    def finish(self, drawn: Sequence[Sequence[Drawn]]) -> list[Event]:
        """Return the events of the earliest planned step.

        Args:
            drawn: its results by row, as `Decoder.end` returns them.
        """
        events: list[Event] = []
        for one, results in zip(self._planned.popleft(), drawn, strict=True):
            sample = one.sample
            sample.is_planned = False
            if sample.sequence.ended:
                continue
            self._pool.publish(sample.sequence)
            if sample.num_drawn:
                events += self._grown(sample, results[0])
            else:
                events += self._prompt_computed(one, results)
        return events

    def _next_tokens(self) -> list[_Planned]:
        """Return rows of samples, a fraction of them if several steps are in flight."""
        share = -(-len(self._samples) // self._max_planned)
        count = min(self._limits.tokens, share)
        chosen = [sample for sample in self._samples if not sample.is_planned][:count]
        taken = set(chosen)
        self._samples = deque([one for one in self._samples if one not in taken] + chosen)
        for sample in chosen:
            sample.is_planned = True
        return [self._row(one, [one.last], [one.draw(one.index)], ()) for one in chosen]

    def _chunks(self, budget: int) -> list[_Planned]:
        """Return rows of prompts, within the budget of tokens."""
        scored_budget = self._limits.scored_tokens
        planned = []
        for prompt in self._admitted():
            if budget <= 0:
                break
            count = min(budget, len(prompt.request.prompt) - len(prompt.sequence.tokens))
            if prompt.request.prompt_log_probs:
                count = min(count, scored_budget)
                scored_budget -= count
            if count:
                planned.append(self._chunk(prompt, count))
            budget -= count
        return planned

    def _admitted(self) -> Sequence[_Sample]:
        """Return prompts to compute, including those that fit now."""
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

    def _chunk(self, prompt: _Sample, count: int) -> _Planned:
        request, start = prompt.request, len(prompt.sequence.tokens)
        tokens = request.prompt[start : start + count]
        is_last = start + count == len(request.prompt)
        draws = [prompt.draw(i) for i in range(request.n)] if is_last and request.max_tokens else ()
        scored: Sequence[Draw] = ()
        if request.prompt_log_probs:
            num_top = request.num_top_log_probs
            following = request.prompt[start + 1 : start + count + 1]
            scored = [Draw(0, temperature=0.0, forced=i, num_top=num_top) for i in following]
        return self._row(prompt, tokens, draws, scored, ends_prompt=is_last)

    def _row(
        self,
        sample: _Sample,
        tokens: Sequence[int],
        draws: Sequence[Draw],
        scored: Sequence[Draw],
        *,
        ends_prompt: bool = False,
    ) -> _Planned:
        start = len(sample.sequence.tokens)
        copy = self._pool.extend(sample.sequence, tokens)
        row = StepRow(tokens, start, tuple(sample.sequence.blocks), draws, scored)
        return _Planned(sample, row, copy, ends_prompt)

    def _prompt_computed(self, chunk: _Planned, results: Sequence[Drawn]) -> list[Event]:
        """Handle a computed chunk; at the prompt's end its samples begin."""
        prompt, request = chunk.sample, chunk.sample.request
        events: list[Event] = []
        num_scored = len(chunk.row.scored)
        prompt.scores += results[:num_scored]
        if not chunk.ends_prompt:
            return events
        self._prompts.remove(prompt)
        if request.prompt_log_probs:
            events.append(PromptScored(prompt.request_id, tuple(prompt.scores)))
        if not request.max_tokens:
            self._pool.end(prompt.sequence)
            ids = range(request.n)
            return [*events, *(SampleEnded(prompt.request_id, i, "length") for i in ids)]
        sequences = [
            prompt.sequence,
            *(self._pool.fork(prompt.sequence) for _ in range(1, request.n)),
        ]
        for i, sequence in enumerate(sequences):
            sample = _Sample(prompt.request_id, request, i, sequence)
            self._samples.append(sample)
            events += self._grown(sample, results[num_scored + i])
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


def _cancelled(request_id: int, samples: Sequence[int]) -> list[Event]:
    return [SampleEnded(request_id, i, "cancelled") for i in samples]
