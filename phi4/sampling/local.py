"""A sampler over the generation engine of this process and of the ranks that share its model.

The engine only handles ids, so a stop string ends a sample here and cancels it in the engine. Later
engine events of an ended sample are dropped.
"""

import math
from collections import deque
from collections.abc import Sequence

from phi4.data.vocabulary.tokenizer import Tokenizer
from phi4.engine.generation.draws import Drawn
from phi4.engine.generation.events import Event as EngineEvent
from phi4.engine.generation.events import PromptScored, SampleEnded, TokenDrawn
from phi4.engine.generation.generator import Generator
from phi4.errors import ConfigError, SamplerError
from phi4.sampling.checks import check_request
from phi4.sampling.protocol import (
    Alternative,
    Completion,
    Event,
    FinishReason,
    ModelLimits,
    PromptToken,
    Request,
    SamplerLoad,
    ScoredPrompt,
    Token,
)
from phi4.sampling.samples import OpenSample


class LocalSampler:
    """A `Sampler` on the leader rank of a generator; the other ranks call `Generator.follow`.

    Args:
        generator: an entered generator, used only by this sampler.
        tokenizer: tokenizer of the model, with as many ids as the generator samples from.

    Raises:
        ConfigError: the generator was created for another number of ids.
    """

    def __init__(self, generator: Generator, tokenizer: Tokenizer) -> None:
        if generator.num_ids != tokenizer.vocab_size:
            raise ConfigError(
                f"the generator samples from {generator.num_ids} ids, but the tokenizer has "
                f"{tokenizer.vocab_size}; create the generator with num_ids={tokenizer.vocab_size}"
            )
        self.limits = ModelLimits(generator.num_ids, generator.max_sequence_tokens)
        self._generator = generator
        self._tokenizer = tokenizer
        self._open: dict[int, dict[int, OpenSample]] = {}
        self._coming: deque[EngineEvent] = deque()
        self._happened: list[Event] = []
        self._closed = False

    def submit(self, request: Request) -> int:
        """See `Sampler.submit`.

        Raises:
            ConfigError: the request is invalid, or the cache is too small for it.
        """
        check_request(request, self.limits)
        request_id = self._generator.submit(request)
        self._open[request_id] = {
            index: OpenSample(request_id, index, request, self._tokenizer)
            for index in range(request.n)
        }
        return request_id

    def step(self) -> Sequence[Event]:
        """See `Sampler.step`.

        It must be called regularly, even without requests, so that the other ranks do not consider
        this one dead.

        Raises:
            SamplerError: the model returns NaN probabilities for a request.

        Collectives: those of `Generator.step`, until the sampler is closed.
        """
        if self._closed:
            return []
        self._coming += self._generator.step()
        while self._coming:
            event = self._coming.popleft()
            if event.request_id in self._open and _has_nan(event):
                del self._open[event.request_id]
                self._generator.cancel(event.request_id)
                self._happened = [e for e in self._happened if e.request_id != event.request_id]
                raise SamplerError(
                    "the model's probabilities are NaN: its weights have diverged, or its numbers "
                    "overflow; use an earlier checkpoint, or another precision",
                    event.request_id,
                )
            self._happened += self._events(event)
        happened, self._happened = self._happened, []
        return happened

    def cancel(self, request_id: int) -> None:
        """See `Sampler.cancel`."""
        if request_id in self._open:
            self._generator.cancel(request_id)

    def load(self) -> SamplerLoad:
        """See `ReportsLoad`."""
        pool, queued = self._generator.pool, self._generator.num_waiting
        running = max(0, len(self._open) - queued)
        return SamplerLoad(pool.num_in_use, pool.num_blocks, running, queued)

    def reload(self, place: str) -> None:
        """Load other weights, on all ranks.

        Args:
            place: see `Generator.load`.

        Raises:
            ValueError: requests are in progress.
            CheckpointError: the weights are unchanged.

        Collectives: those of `Generator.step` and of `Generator.load`.
        """
        if self._open:
            raise ValueError(
                f"{len(self._open)} requests are in progress; finish or cancel them first"
            )
        # Samples ended by a stop string may still be in a step, or their cancellation in transfer.
        while not self._generator.is_idle:
            self._coming += self._generator.step()
        self._generator.load(place)

    def close(self) -> None:
        """See `Sampler.close`; the other ranks return from `Generator.follow`.

        Collectives: those of `Generator.step`.
        """
        if self._closed:
            return
        for request_id in self._open:
            self._generator.cancel(request_id)
        self._open.clear()
        self._coming.clear()
        self._happened.clear()
        self._generator.close()
        self._closed = True

    def _events(self, event: EngineEvent) -> list[Event]:
        samples = self._open.get(event.request_id, {})
        match event:
            case PromptScored(request_id, scores):
                prompt = next(iter(samples.values())).request.prompt
                return [ScoredPrompt(request_id, _scored(prompt, scores))]
            case TokenDrawn(request_id, index, drawn) if index in samples:
                happened = samples[index].add(_token(drawn, samples[index].request))
                ended = happened[-1]
                if isinstance(ended, Completion):
                    self._forget(request_id, index)
                    if isinstance(ended.matched, bytes):
                        self._generator.cancel(request_id, index)
                return happened
            case SampleEnded(request_id, index, reason) if index in samples:
                return [self._forget(request_id, index).end(FinishReason(reason))]
        return []

    def _forget(self, request_id: int, index: int) -> OpenSample:
        samples = self._open[request_id]
        sample = samples.pop(index)
        if not samples:
            del self._open[request_id]
        return sample


def _has_nan(event: EngineEvent) -> bool:
    match event:
        case TokenDrawn(drawn=drawn):
            return math.isnan(drawn.log_prob)
        case PromptScored(tokens=tokens):
            return any(math.isnan(one.log_prob) for one in tokens)
    return False


def _scored(prompt: Sequence[int], scores: Sequence[Drawn]) -> tuple[PromptToken, ...]:
    """Return the first token has no predecessor that could predict it."""
    rest = (PromptToken(one.token, one.log_prob, _alternatives(one)) for one in scores)
    return PromptToken(prompt[0], None), *rest


def _token(drawn: Drawn, request: Request) -> Token:
    if not request.log_probs:
        return Token(drawn.token)
    return Token(drawn.token, drawn.log_prob, drawn.sampled_log_prob, _alternatives(drawn))


def _alternatives(drawn: Drawn) -> tuple[Alternative, ...]:
    return tuple(Alternative(token_id, log_prob) for token_id, log_prob in drawn.top)
