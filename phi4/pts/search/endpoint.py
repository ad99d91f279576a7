"""Check whether an endpoint supports a search, before the search samples anything."""

from dataclasses import replace

from phi4.errors import ConfigError, SamplerError
from phi4.pts.search.drawing import DrawOptions
from phi4.sampling.batch import answers
from phi4.sampling.protocol import Request, Sampler

_NUM_TRIES = 8


def check_endpoint_options(options: DrawOptions) -> None:
    """Raise an error for sampling settings whose probabilities an endpoint does not report.

    Raises:
        ConfigError: temperature or top-p is not 1.
    """
    for name in ("temperature", "top_p"):
        if (value := getattr(options, name)) != 1:
            option = name.replace("_", "-")
            raise ConfigError(
                f"--{option}={value:g}, but an endpoint reports a token's probability only at 1; "
                f"omit --{option}, or search a model on disk"
            )


def check_endpoint(sampler: Sampler, prompt: tuple[int, ...]) -> None:
    """Test the four endpoint features that a search needs, with one token each.

    Args:
        sampler: over the endpoint.
        prompt: prompt of any question.

    Raises:
        ConfigError: it lacks one of them: prompts as token ids, ids of sampled tokens, their
            log-probs, `logit_bias`.
    """
    request = Request(prompt=prompt, max_tokens=1, log_probs=True)
    token = _first_ids(sampler, request, "token ids or log_probs")[0]
    banned = replace(request, log_probs=False, n=_NUM_TRIES, forbidden_first=frozenset((token,)))
    if token in _first_ids(sampler, banned, "logit_bias"):
        raise ConfigError(
            f"the endpoint does not support a search: it sampled token id {token}, which "
            f"logit_bias=-100 forbids; use one that supports logit_bias, or a model on disk"
        )


def _first_ids(sampler: Sampler, request: Request, needed: str) -> list[int]:
    try:
        [answer] = answers(sampler, [request])
    except SamplerError as error:
        raise ConfigError(
            f"the endpoint does not support a search, which needs {needed}: {error}"
        ) from None
    ids = [one.tokens[0].id for one in answer.completions if one.tokens]
    if not ids:
        raise ConfigError(
            "the endpoint does not support a search: it returned nothing for the first question; "
            "check its log"
        )
    return ids
