"""The sampling protocol: requests, events, and the interface of every sampler.

A sampler is polled: `submit` queues a request and `step` advances all requests and returns their
events. One or a million requests, streamed or not, cancelled or not, from a server or from a search
that waits for answers, thus all use the same three calls from one thread. `phi4.sampling.batch` has
the two loops that most callers need.

Everything here is in token ids; `phi4.sampling.text` converts them to text.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol, runtime_checkable


@dataclass(frozen=True, kw_only=True)
class Request:
    """A prompt, and the sampling parameters of its continuation.

    The distribution of a token is computed in this order: `logit_bias` and `forbidden_first`,
    division by the temperature, `top_k`, `top_p` of the tokens that top_k leaves, `min_p`. Sampling
    is a function of `seed`, index of the sample and position, independent of other requests.

    Attributes:
        prompt: token ids, at least one.
        n: samples, drawn independently of each other.
        max_tokens: maximum new tokens per sample, including forced ones. 0 only with
            `prompt_log_probs`.
        temperature: 0 takes the likeliest token, the lowest id among equals.
        top_p: the smallest set of likeliest tokens whose probabilities add up to this; 1 keeps all.
        top_k: the k likeliest tokens; 0 keeps all.
        min_p: tokens at least this fraction as likely as the likeliest; 0 keeps all.
        seed: sampling seed, below 2^63.
        forced: the first new tokens. They are not sampled, but get log-probs like any other.
        forbidden_first: ids that may not be the first new token.
        logit_bias: added to the logits of these ids at every position.
        stop_ids: a sample ends with the first of these, which is its last token.
        stop_strings: a sample ends with the token whose bytes complete one of these.
        log_probs: whether tokens have log-probs.
        num_top_log_probs: number of likeliest alternatives with each log-prob.
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
    """Limits for requests.

    Attributes:
        vocab_size: ids of the tokenizer; only these are accepted and sampled.
        max_sequence_tokens: prompt and new tokens together; None if only the model knows.
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
        log_prob: of the raw model: no bias, temperature 1, no truncation. None if the request has
            no log-probs.
        sampled_log_prob: in the distribution that it was sampled from; minus infinity for a forced
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
    """A sample ended; sent exactly once for each of a request's n samples.

    Attributes:
        request_id: what `Sampler.submit` returned.
        sample: index of the sample, below n.
        tokens: all of its tokens, as sampled.
        finish_reason: why it ended.
        matched: the stop id or stop string that ended it; None without one, or if a remote model
            does not report it.
    """

    request_id: int
    sample: int
    tokens: tuple[Token, ...]
    finish_reason: FinishReason
    matched: int | bytes | None = None


Event = ScoredPrompt | NewToken | Completion


class Sampler(Protocol):
    """A model that answers requests. One thread makes all calls."""

    @property
    def limits(self) -> ModelLimits:
        """Limits for its requests."""

    def submit(self, request: Request) -> int:
        """Queue a request.

        Returns:
            Its id: 0, 1, 2 and so on.

        Raises:
            ConfigError: the request is invalid, or uses a feature that this sampler lacks; it is
                not queued.
        """

    def step(self) -> Sequence[Event]:
        """Advance all requests; wait for events if the model is remote.

        Returns:
            Events since the last call, in order; may be empty while prompts are processed. For a
            sample: its tokens as they arrive, then its completion.

        Raises:
            SamplerError: a request failed and is gone; the others are not affected.
        """

    def cancel(self, request_id: int) -> None:
        """End the unfinished samples of a request: the next step returns their completions.

        A request that has ended, or never existed, is ignored.
        """

    def close(self) -> None:
        """Release the sampler's resources; no further events."""


@dataclass(frozen=True)
class SamplerLoad:
    """Load of a sampler.

    Attributes:
        blocks_in_use: cache blocks in use by requests in progress.
        num_blocks: blocks of its cache.
        running: requests being computed.
        queued: requests that wait for cache space.
    """

    blocks_in_use: int
    num_blocks: int
    running: int
    queued: int


@runtime_checkable
class ReportsLoad(Protocol):
    """A sampler that has its own cache."""

    def load(self) -> SamplerLoad:
        """Return its load; from the thread that makes all other calls."""
