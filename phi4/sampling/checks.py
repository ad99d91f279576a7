"""Whether a request can be answered at all: one error for each fault, before any output."""

import math
from collections.abc import Iterator

from phi4.errors import ConfigError
from phi4.sampling.protocol import ModelLimits, Request

MIN_TEMPERATURE = 1e-30
"""Logits of up to 3e8, divided by it, are still finite in fp32."""

MAX_BIAS = 1e6
"""Beyond every logit, and finite in fp32 when divided by `MIN_TEMPERATURE`."""

_END_OF_SEEDS = 1 << 63


def check_request(request: Request, limits: ModelLimits) -> None:
    """Refuse what no sampler of this model could answer.

    Raises:
        ConfigError: the first fault, in one line.
    """
    for rule in (_lengths, _ids, _distribution, _stops, _log_probs):
        for fault in rule(request, limits):
            raise ConfigError(fault)


def _lengths(request: Request, limits: ModelLimits) -> Iterator[str]:
    num_prompt, longest = len(request.prompt), limits.max_sequence_tokens
    if not num_prompt:
        yield "the prompt has no token; give at least one"
    if request.n < 1:
        yield f"n={request.n} asks for no sample; ask for 1 or more"
    if request.max_tokens < 0:
        yield f"max_tokens={request.max_tokens} is negative; ask for 1 or more"
    if request.max_tokens == 0 and not request.prompt_log_probs:
        yield "max_tokens=0 asks for nothing; ask for 1 or more, or for prompt_log_probs"
    if len(request.forced) > request.max_tokens:
        yield (
            f"{len(request.forced)} forced tokens exceed max_tokens={request.max_tokens}; force "
            "fewer or raise max_tokens"
        )
    if longest is not None and num_prompt + request.max_tokens > longest:
        yield (
            f"a prompt of {num_prompt} tokens and {request.max_tokens} new ones exceed the "
            f"model's {longest}; shorten the prompt or lower max_tokens"
        )


def _ids(request: Request, limits: ModelLimits) -> Iterator[str]:
    for name in ("prompt", "forced", "forbidden_first", "logit_bias", "stop_ids"):
        outside = [i for i in getattr(request, name) if not 0 <= i < limits.vocab_size]
        if outside:
            yield (
                f"{name} has token id {outside[0]}; the model has ids 0 to "
                f"{limits.vocab_size - 1}: use its own tokenizer"
            )
    if request.forced and request.forced[0] in request.forbidden_first:
        yield f"token id {request.forced[0]} is both forced and forbidden first; drop one of them"
    early = [i for i in request.forced[:-1] if i in request.stop_ids]
    if early:
        yield (
            f"forced token id {early[0]} is a stop id with forced tokens behind it; force nothing "
            "behind it, or take it out of stop_ids"
        )
    if len(request.forbidden_first) >= limits.vocab_size:
        yield "forbidden_first holds the whole vocabulary; leave at least one id to draw"


def _distribution(request: Request, limits: ModelLimits) -> Iterator[str]:
    temperature = request.temperature
    if not 0 <= temperature < math.inf:
        yield f"temperature={temperature} is no temperature; give 0 (the likeliest token) or more"
    if 0 < temperature < MIN_TEMPERATURE:
        yield (
            f"temperature={temperature} makes logits overflow; give 0 for the likeliest token, or "
            f"at least {MIN_TEMPERATURE}"
        )
    if not 0 < request.top_p <= 1:
        yield f"top_p={request.top_p} is outside (0, 1]; 1 keeps all tokens"
    if not 0 <= request.min_p < 1:
        yield f"min_p={request.min_p} is outside [0, 1); 0 keeps all tokens"
    if request.top_k < 0:
        yield f"top_k={request.top_k} is negative; 0 keeps all tokens"
    if not 0 <= request.seed < _END_OF_SEEDS:
        yield f"seed={request.seed} is outside 0 to 2^63 - 1; give one within"
    for token_id, bias in request.logit_bias.items():
        if not abs(bias) <= MAX_BIAS:
            yield (
                f"logit_bias of token id {token_id} is {bias}; give a number from {-MAX_BIAS:.0f} "
                f"(never drawn) to {MAX_BIAS:.0f}"
            )


def _stops(request: Request, limits: ModelLimits) -> Iterator[str]:
    if b"" in request.stop_strings:
        yield "a stop string is empty, so it would stop every text at once; leave it out"


def _log_probs(request: Request, limits: ModelLimits) -> Iterator[str]:
    num_top = request.num_top_log_probs
    if not 0 <= num_top <= limits.vocab_size:
        yield f"num_top_log_probs={num_top} is outside 0 to {limits.vocab_size}, the vocabulary"
    if num_top > 0 and not (request.log_probs or request.prompt_log_probs):
        yield f"num_top_log_probs={num_top} needs log_probs or prompt_log_probs; set one of them"
