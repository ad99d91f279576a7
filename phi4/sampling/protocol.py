"""What can be asked of a model, what it answers, and the one interface of everything that samples.

The decision: a sampler is pulled. `submit` queues a request and `step` advances all of them and
returns what happened. So one request or a million, streamed or not, cancelled or not, of a server
whose requests arrive at any time or of a search that waits for answers before it asks on, are the
same three calls from one thread. `phi4.sampling.batch` holds the two loops that most callers want.

Everything here is in token ids; `phi4.sampling.text` makes text of them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol, runtime_checkable


@dataclass(frozen=True, kw_only=True)
class Request:
    """A prompt, and how to draw what follows it.

    The distribution of a token is made in this order: `logit_bias` and `forbidden_first`, division
    by the temperature, `top_k`, `top_p` of what top_k leaves, `min_p`. A draw is a function of
    `seed`, index of the sample and position, whatever else the sampler is doing.

    Attributes:
        prompt: token ids, at least one.
        n: samples, drawn independently of each other.
        max_tokens: at most so many new tokens per sample, forced ones included. 0 with
            `prompt_log_probs` only.
        temperature: 0 takes the likeliest token, the lowest id where several are.
        top_p: the smallest set of likeliest tokens whose probabilities add up to this; 1 keeps all.
        top_k: the k likeliest tokens; 0 keeps all.
        min_p: tokens at least this fraction as likely as the likeliest; 0 keeps all.
        seed: sampling seed, below 2^63.
        forced: the first new tokens. They are not drawn, but get log-probs like any other.
        forbidden_first: ids that the first new token is not.
        logit_bias: added to the logits of these ids at every position.
        stop_ids: a sample ends with the first of these, which is its last token.
        stop_strings: a sample ends with the token whose bytes complete one of these.
        log_probs: whether tokens carry their log-probs.
        num_top_log_probs: so many of the likeliest alternatives come with each log-prob.
        prompt_log_probs: whether the prompt's tokens are scored too.
    """

    prompt: tuple[int, ...]
    max_tokens: int
    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int = 0
    forced: tuple[int, ...] = ()
    forbidden_first: frozenset[int] = frozenset()
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    stop_ids: frozenset[int] = frozenset()
    stop_strings: tuple[bytes, ...] = ()
    log_probs: bool = False
    num_top_log_probs: int = 0
    prompt_log_probs: bool = False


@dataclass(frozen=True)
class ModelLimits:
    """What a request has to keep to.

    Attributes:
        vocab_size: ids of the tokenizer; none beyond them is taken or drawn.
        max_sequence_tokens: prompt and new tokens together; None where only the model knows.
    """

    vocab_size: int
    max_sequence_tokens: int | None = None


@dataclass(frozen=True)
class Alternative:
    """One of the likeliest tokens at a position, with its raw log-prob."""

    id: int
    log_prob: float


@dataclass(frozen=True)
class Token:
    """A new token.

    Attributes:
        id: token id.
        log_prob: of the raw model: no bias, temperature 1, nothing cut off. None where the request
            does not ask for log-probs.
        sampled_log_prob: in the distribution that it was drawn from; minus infinity for a forced
            token that this distribution excludes. None as above.
        top: the likeliest tokens of the raw model, likeliest first.
    """

    id: int
    log_prob: float | None = None
    sampled_log_prob: float | None = None
    top: tuple[Alternative, ...] = ()


@dataclass(frozen=True)
class PromptToken:
    """A token of the prompt, scored by the raw model; the first one has no log-prob and no top."""

    id: int
    log_prob: float | None
    top: tuple[Alternative, ...] = ()


class FinishReason(StrEnum):
    """Why a sample ended."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"


@dataclass(frozen=True)
class ScoredPrompt:
    """The log-probs of a prompt, before the first token of its samples."""

    request_id: int
    tokens: tuple[PromptToken, ...]


@dataclass(frozen=True)
class NewToken:
    """A sample grew by one token."""

    request_id: int
    sample: int
    token: Token


@dataclass(frozen=True)
class Completion:
    """A sample ended: every one of a request's n does, exactly once.

    Attributes:
        request_id: what `Sampler.submit` returned.
        sample: index of the sample, below n.
        tokens: all of its tokens, as they were drawn.
        finish_reason: why it ended.
        matched: the stop id or stop string that ended it; None without one, or where a remote
            model does not say which.
    """

    request_id: int
    sample: int
    tokens: tuple[Token, ...]
    finish_reason: FinishReason
    matched: int | bytes | None = None


Event = ScoredPrompt | NewToken | Completion


class Sampler(Protocol):
    """A model that answers requests. One thread makes all the calls."""

    @property
    def limits(self) -> ModelLimits:
        """What its requests have to keep to."""

    def submit(self, request: Request) -> int:
        """Queue a request.

        Returns:
            Its id: 0, 1, 2 and so on.

        Raises:
            ConfigError: the request is impossible, or asks for what this sampler lacks. Nothing of
                it is queued then.
        """

    def step(self) -> Sequence[Event]:
        """Go on with all requests, and wait for that where the model is elsewhere.

        Returns:
            What happened since the last call, in order; it may be nothing as long as prompts are
            read. Of a sample: its tokens as they come, then its completion.

        Raises:
            SamplerError: a request failed and is gone; the others are not affected.
        """

    def cancel(self, request_id: int) -> None:
        """End the unfinished samples of a request: the next step returns their completions.

        A request that has ended, or never was, is left alone.
        """

    def close(self) -> None:
        """Give back what the sampler holds; without further events."""


@dataclass(frozen=True)
class SamplerLoad:
    """How busy a sampler is.

    Attributes:
        blocks_in_use: of its cache, by requests under way.
        num_blocks: of its cache.
        running: requests that it computes.
        queued: requests that wait until the cache has room for them.
    """

    blocks_in_use: int
    num_blocks: int
    running: int
    queued: int


@runtime_checkable
class ReportsLoad(Protocol):
    """A sampler that has a cache of its own."""

    def load(self) -> SamplerLoad:
        """How busy it is; from the thread that makes all other calls."""
