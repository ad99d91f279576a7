"""Whether an endpoint can serve a search, found out before the search draws anything."""

from dataclasses import replace

from phi4.errors import ConfigError, SamplerError
from phi4.pts.search.drawing import DrawOptions
from phi4.sampling.batch import answers
from phi4.sampling.protocol import Request, Sampler

_NUM_TRIES = 8


def check_endpoint_options(options: DrawOptions) -> None:
    """Refuse draws whose probabilities an endpoint does not tell.

    Raises:
        ConfigError: temperature or top-p is not 1.
    """
    for name in ("temperature", "top_p"):
        if (value := getattr(options, name)) != 1:
            option = name.replace("_", "-")
            raise ConfigError(
                f"--{option}={value:g}, but an endpoint tells a token's probability only at 1; "
                f"leave --{option} out, or search a model on disk"
            )


def check_endpoint(sampler: Sampler, prompt: tuple[int, ...]) -> None:
    """Ask an endpoint for the four things that a search needs, one token each.

    Args:
        sampler: over the endpoint.
        prompt: of any question.

    Raises:
        ConfigError: it lacks one of them: prompts as token ids, ids of what it drew, their
            log-probs, `logit_bias`.
    """
    request = Request(prompt=prompt, max_tokens=1, log_probs=True)
    token = _first_ids(sampler, request, "token ids or log_probs")[0]
    banned = replace(request, log_probs=False, n=_NUM_TRIES, forbidden_first=frozenset((token,)))
    if token in _first_ids(sampler, banned, "logit_bias"):
        raise ConfigError(
            f"the endpoint cannot serve a search: it drew token id {token}, which logit_bias=-100 "
            "forbids; use one that takes logit_bias, or a model on disk"
        )


def _first_ids(sampler: Sampler, request: Request, needed: str) -> list[int]:
    try:
        [answer] = answers(sampler, [request])
    except SamplerError as error:
        raise ConfigError(
            f"the endpoint cannot serve a search, which needs {needed}: {error}"
        ) from None
    ids = [one.tokens[0].id for one in answer.completions if one.tokens]
    if not ids:
        raise ConfigError(
            "the endpoint cannot serve a search: it drew nothing behind the first question; "
            "look at its log"
        )
    return ids
