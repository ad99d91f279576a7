"""Build an endpoint's request: the path and the body, or the reason why it is not supported."""

from collections.abc import Iterator, Mapping

from phi4.data.vocabulary.tokenizer import Tokenizer
from phi4.sampling.chat import plain_text, read_chat_prompt
from phi4.sampling.endpoint import Endpoint, PromptForm
from phi4.sampling.protocol import Request
from phi4.sampling.text import end_ids

_MAX_BIAS = 100
_MAX_TOP_LOG_PROBS = 20
_MAX_STOP_STRINGS = 64


def lacks(request: Request, form: PromptForm, tokenizer: Tokenizer) -> Iterator[str]:
    """Return features of a request that an endpoint does not support."""
    if form is PromptForm.PHI4:
        if request.num_top_log_probs > _MAX_TOP_LOG_PROBS:
            yield f"return more than {_MAX_TOP_LOG_PROBS} of num_top_log_probs; request fewer"
        return
    if request.prompt_log_probs:
        yield "score prompts (prompt_log_probs); use a local model, or form=phi4 with `phi4 serve`"
    if form is PromptForm.IDS:
        yield from _lacks_in_ids(request)
        return
    for name in ("forced", "forbidden_first", "logit_bias", "log_probs", "top_k", "min_p"):
        if getattr(request, name):
            yield f"support {name}; use form=ids, or a local model"
    if request.stop_ids - end_ids(tokenizer):
        yield "stop at ids other than the ends of a text (stop_ids); use form=ids"


def _lacks_in_ids(request: Request) -> Iterator[str]:
    raw_is_sampled = (request.temperature, request.top_p, request.top_k) == (1, 1, 0)
    if request.log_probs and request.forced:
        yield "return the log-probs of forced tokens; remove log_probs or forced"
    if request.log_probs and not (
        raw_is_sampled
        and not request.min_p
        and not request.logit_bias
        and not request.forbidden_first
    ):
        yield (
            "return both log-probs if the sampler differs from the raw model; sample at "
            "temperature 1 without truncation and bias"
        )
    if request.forbidden_first and request.max_tokens > 1 and not request.forced:
        yield "forbid the first token only (forbidden_first); request max_tokens=1 and continue"
    if any(abs(bias) > _MAX_BIAS for bias in request.logit_bias.values()):
        yield f"apply a logit_bias beyond {_MAX_BIAS}; lower it"


def path_and_body(
    request: Request, endpoint: Endpoint, tokenizer: Tokenizer
) -> tuple[str, dict[str, object]]:
    """Return the path below the endpoint's address, and the body.

    Raises:
        DataError: the prompt cannot be written in the endpoint's form.
    """
    body: dict[str, object] = {
        "model": endpoint.model,
        "max_tokens": request.max_tokens,
        "n": request.n,
        "temperature": request.temperature,
        "top_p": request.top_p,
        "seed": request.seed,
        "stream": True,
    }
    match endpoint.form:
        case PromptForm.PHI4:
            return "/completions", body | _given(_phi4_fields(request))
        case PromptForm.IDS:
            return "/completions", body | _given(_fields_in_ids(request))
        case PromptForm.TEXT:
            return "/completions", body | {"prompt": plain_text(request.prompt, tokenizer)}
        case PromptForm.CHAT:
            turns = read_chat_prompt(request.prompt, tokenizer)
            said = [{"role": turn.role.value, "content": turn.content} for turn in turns]
            return "/chat/completions", body | {"messages": said}


def _phi4_fields(request: Request) -> dict[str, object]:
    """Return the fields of `phi4 serve`: each field of a request has its own; sampling equals a
    local model's."""
    has_log_probs = request.log_probs or request.prompt_log_probs
    return {
        **_extensions(request),
        "prompt": list(request.prompt),
        "echo": request.prompt_log_probs or None,
        "ignore_eos": True,
        "logit_bias": _by_name(request.logit_bias),
        "first_token_forced": list(request.forced) or None,
        "first_tokens_forbidden": sorted(request.forbidden_first) or None,
        "logprobs": request.num_top_log_probs if has_log_probs else None,
        "return_tokens_as_token_ids": has_log_probs or None,
        "sampled_logprobs": request.log_probs or None,
        "stop": _stop_texts(request),
    }


def _fields_in_ids(request: Request) -> dict[str, object]:
    """Return vLLM's fields: forced tokens are part of the prompt, forbidden ones have a bias."""
    bias = dict(request.logit_bias)
    if not request.forced:
        bias |= dict.fromkeys(request.forbidden_first, -_MAX_BIAS)
    return {
        **_extensions(request),
        "prompt": [*request.prompt, *request.forced],
        "max_tokens": request.max_tokens - len(request.forced),
        "logit_bias": _by_name(bias),
        "logprobs": request.num_top_log_probs if request.log_probs else None,
        "return_tokens_as_token_ids": request.log_probs or None,
    }


def _extensions(request: Request) -> dict[str, object]:
    return {
        "return_token_ids": True,
        "stop_token_ids": sorted(request.stop_ids) or None,
        "top_k": request.top_k or None,
        "min_p": request.min_p or None,
    }


def _by_name(bias: Mapping[int, float]) -> dict[str, float] | None:
    return {str(token_id): value for token_id, value in bias.items()} or None


def _stop_texts(request: Request) -> list[str] | None:
    """Return stop strings, so that the server stops early; they are also searched here."""
    try:
        texts = [stop.decode() for stop in request.stop_strings]
    except UnicodeDecodeError:
        return None
    return texts if 0 < len(texts) <= _MAX_STOP_STRINGS else None


def _given(fields: dict[str, object]) -> dict[str, object]:
    return {name: value for name, value in fields.items() if value is not None}
