"""A request as the generation engine takes it, and what must hold before it is queued."""

import math
from collections.abc import Mapping, Sequence, Set
from typing import Protocol

from phi4.errors import ConfigError

MIN_TEMPERATURE = 1e-6
"""Below it, and above 0, a temperature is a mistake: 0 is exact and asks for the same."""


class GenerationRequest(Protocol):
    """What the engine needs of a request (phi4.sampling.protocol.Request); plain values."""

    @property
    def prompt(self) -> Sequence[int]:
        """Token ids, at least one."""
        ...

    @property
    def n(self) -> int:
        """Samples, at least one."""
        ...

    @property
    def max_tokens(self) -> int:
        """At most so many new tokens per sample; 0 only to score the prompt."""
        ...

    @property
    def temperature(self) -> float:
        """0 takes the most probable token."""
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
        """In [0, 1]."""
        ...

    @property
    def seed(self) -> int:
        """Of the draws, 64 bits."""
        ...

    @property
    def forced(self) -> Sequence[int]:
        """The first new tokens."""
        ...

    @property
    def forbidden_first(self) -> Set[int]:
        """Ids that the first new token is not."""
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


def check_request(request: GenerationRequest, num_ids: int, max_positions: int) -> None:
    """Check a request against the model.

    Args:
        request: any.
        num_ids: ids of the tokenizer.
        max_positions: longest sequence of the model.

    Raises:
        ConfigError: something is out of range; the first one found.
    """
    if not request.prompt:
        raise ConfigError("the prompt has no token; give at least one")
    _check_ids("prompt", request.prompt, num_ids)
    _check_ids("forced", request.forced, num_ids)
    _check_ids("forbidden_first", request.forbidden_first, num_ids)
    _check_ids("logit_bias", request.logit_bias, num_ids)
    least = 0 if request.prompt_log_probs else 1
    _check("n", request.n, request.n >= 1, "at least 1")
    _check("max_tokens", request.max_tokens, least <= request.max_tokens, f"at least {least}")
    length = len(request.prompt) + request.max_tokens
    if length > max_positions:
        raise ConfigError(
            f"a prompt of {len(request.prompt)} tokens and {request.max_tokens} new ones exceed "
            f"the model's {max_positions}; shorten the prompt or lower max_tokens"
        )
    temperature = request.temperature
    is_warm = MIN_TEMPERATURE <= temperature < math.inf
    expected = f"0, or {MIN_TEMPERATURE:g} and more"
    _check("temperature", temperature, temperature == 0 or is_warm, expected)
    _check("top_p", request.top_p, 0 < request.top_p <= 1, "above 0 and at most 1")
    _check("top_k", request.top_k, request.top_k >= 0, "a count, or 0 for all")
    _check("min_p", request.min_p, 0 <= request.min_p <= 1, "0 to 1")
    _check("seed", request.seed, -(2**63) <= request.seed < 2**64, "a number of 64 bits")
    top = request.num_top_log_probs
    _check("num_top_log_probs", top, 0 <= top <= num_ids, f"0 to {num_ids}")
    for token, bias in request.logit_bias.items():
        _check(f"logit_bias[{token}]", bias, math.isfinite(bias), "a finite number")
    if len(set(request.forbidden_first)) >= num_ids:
        raise ConfigError(f"forbidden_first holds all {num_ids} ids; leave one to draw")


def _check(name: str, found: float, holds: bool, expected: str) -> None:
    if not holds:
        raise ConfigError(f"{name}={found}; expected {expected}")


def _check_ids(name: str, ids: Sequence[int] | Set[int] | Mapping[int, float], count: int) -> None:
    wrong = [token for token in ids if not 0 <= token < count]
    if wrong:
        raise ConfigError(
            f"{name} has the token id {wrong[0]}; expected 0 to {count - 1}; use the tokenizer of "
            "the training"
        )
