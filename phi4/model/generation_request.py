"""The generation request in token ids, and the checks that apply to every model.

The checks are in a layer below both the generation engine and `phi4.sampling`, so that there is one
set of them, and an endpoint's client checks its requests without loading an engine.
"""

import math
from collections.abc import Mapping, Sequence, Set
from typing import Protocol

from phi4.errors import ConfigError

MIN_TEMPERATURE = 1e-6
"""A temperature between 0 and this is an error: 0 is exact and means the same."""

MAX_BIAS = 1e6
"""Larger than every logit, and finite in fp32 when divided by `MIN_TEMPERATURE`."""

_END_OF_SEEDS = 1 << 63


class GenerationRequest(Protocol):
    """The fields of a request that an engine needs; `phi4.sampling.protocol.Request` is one."""

    @property
    def prompt(self) -> Sequence[int]:
        """Token ids, at least one."""
        ...

    @property
    def n(self) -> int:
        """Number of samples, at least one."""
        ...

    @property
    def max_tokens(self) -> int:
        """Maximum number of new tokens per sample; 0 only to score the prompt."""
        ...

    @property
    def temperature(self) -> float:
        """Temperature; 0 takes the most probable token."""
        ...

    @property
    def top_p(self) -> float:
        """In (0, 1]."""
        ...

    @property
    def top_k(self) -> int:
        """0 keeps all."""
        ...

    @property
    def min_p(self) -> float:
        """Min-p threshold, in [0, 1]."""
        ...

    @property
    def seed(self) -> int:
        """Sampling seed, from 0 to 2^63 - 1."""
        ...

    @property
    def forced(self) -> Sequence[int]:
        """Tokens that every sample starts with."""
        ...

    @property
    def forbidden_first(self) -> Set[int]:
        """Ids that may not be the first new token."""
        ...

    @property
    def logit_bias(self) -> Mapping[int, float]:
        """Added to the logits of these ids at every position."""
        ...

    @property
    def stop_ids(self) -> Set[int]:
        """A sample ends with the first of these."""
        ...

    @property
    def num_top_log_probs(self) -> int:
        """How many of the most probable tokens to report at every position."""
        ...

    @property
    def prompt_log_probs(self) -> bool:
        """Whether to score the prompt's tokens."""
        ...


def check_generation_request(
    request: GenerationRequest, vocab_size: int, max_sequence_tokens: int | None
) -> None:
    """Raise an error for a request that no model of this size can answer.

    Args:
        request: any.
        vocab_size: ids that may be taken and drawn.
        max_sequence_tokens: longest sequence of the model; None where only the model knows.

    Raises:
        ConfigError: the first error found, in one line.
    """
    _check_lengths(request, max_sequence_tokens)
    for name in ("prompt", "forced", "forbidden_first", "logit_bias", "stop_ids"):
        _check_ids(name, getattr(request, name), vocab_size)
    if len(set(request.forbidden_first)) >= vocab_size:
        raise ConfigError(f"forbidden_first holds all {vocab_size} ids; leave at least one")
    _check_distribution(request)
    top = request.num_top_log_probs
    _check("num_top_log_probs", top, 0 <= top <= vocab_size, f"0 to {vocab_size}, the vocabulary")


def _check_lengths(request: GenerationRequest, max_sequence_tokens: int | None) -> None:
    if not request.prompt:
        raise ConfigError("the prompt has no token; give at least one")
    _check("n", request.n, request.n >= 1, "at least 1")
    least = 0 if request.prompt_log_probs else 1
    _check("max_tokens", request.max_tokens, least <= request.max_tokens, f"at least {least}")
    length = len(request.prompt) + request.max_tokens
    if max_sequence_tokens is not None and length > max_sequence_tokens:
        raise ConfigError(
            f"a prompt of {len(request.prompt)} tokens and {request.max_tokens} new ones exceed "
            f"the model's {max_sequence_tokens}; shorten the prompt or lower max_tokens"
        )


def _check_distribution(request: GenerationRequest) -> None:
    temperature = request.temperature
    is_warm = MIN_TEMPERATURE <= temperature < math.inf
    expected = f"0, or {MIN_TEMPERATURE:g} and more"
    _check("temperature", temperature, temperature == 0 or is_warm, expected)
    _check("top_p", request.top_p, 0 < request.top_p <= 1, "above 0 and at most 1")
    _check("top_k", request.top_k, request.top_k >= 0, "a count, or 0 for all")
    _check("min_p", request.min_p, 0 <= request.min_p <= 1, "0 to 1")
    is_seed = 0 <= request.seed < _END_OF_SEEDS
    _check("seed", request.seed, is_seed, "a number of 64 bits, 0 to 2^63 - 1")
    for token, bias in request.logit_bias.items():
        within = abs(bias) <= MAX_BIAS
        _check(f"logit_bias[{token}]", bias, within, f"{-MAX_BIAS:.0f} to {MAX_BIAS:.0f}")


def _check(name: str, found: float, holds: bool, expected: str) -> None:
    if not holds:
        raise ConfigError(f"{name}={found}; expected {expected}")


def _check_ids(name: str, ids: Sequence[int] | Set[int] | Mapping[int, float], count: int) -> None:
    wrong = [token for token in ids if not 0 <= token < count]
    if wrong:
        raise ConfigError(
            f"{name} contains the token id {wrong[0]}; expected 0 to {count - 1}; use the "
            "model's own tokenizer"
        )
