"""Validate requests, with one error per problem, before any output."""

from collections.abc import Iterator

from phi4.errors import ConfigError
from phi4.model.generation_request import check_generation_request
from phi4.sampling.protocol import ModelLimits, Request


def check_request(request: Request, limits: ModelLimits) -> None:
    """Raise an error for a request that no sampler of this model can answer, or that contradicts
    itself.

    Raises:
        ConfigError: the first problem, in one line.
    """
    check_generation_request(request, limits.vocab_size, limits.max_sequence_tokens)
    for fault in _contradictions(request):
        raise ConfigError(fault)


def _contradictions(request: Request) -> Iterator[str]:
    if len(request.forced) > request.max_tokens:
        yield (
            f"{len(request.forced)} forced tokens exceed max_tokens={request.max_tokens}; force "
            "fewer or raise max_tokens"
        )
    if request.forced and request.forced[0] in request.forbidden_first:
        yield f"token id {request.forced[0]} is both forced and forbidden first; remove one of them"
    early = [i for i in request.forced[:-1] if i in request.stop_ids]
    if early:
        yield (
            f"forced token id {early[0]} is a stop id with forced tokens after it; remove the "
            f"tokens after it, or remove it from stop_ids"
        )
    if b"" in request.stop_strings:
        yield "a stop string is empty, so it would stop every text at once; remove it"
    num_top = request.num_top_log_probs
    if num_top > 0 and not (request.log_probs or request.prompt_log_probs):
        yield f"num_top_log_probs={num_top} needs log_probs or prompt_log_probs; set one of them"
