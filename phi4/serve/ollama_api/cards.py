"""Model descriptions of Ollama's API: /api/tags, /api/ps and /api/show."""

import hashlib
from typing import Any

from phi4.data.vocabulary.chat import CHAT_FORMAT, Role
from phi4.sampling.text import end_ids
from phi4.serve.api_errors import ApiError
from phi4.serve.ollama_api.bodies import OllamaOptions
from phi4.serve.ollama_api.replies import rfc3339
from phi4.serve.served_model import ServedModel

_FAMILY = "phi3"
"""The architecture's name in GGUF files, Hugging Face configs and Ollama."""

_BYTES = {"F32": 4, "BF16": 2, "F16": 2}
_DEFAULT_TAG = ":latest"
_NEVER_UNLOADED = "9999-12-31T23:59:59Z"


def full_name(name: str) -> str:
    """Return a model's name with its tag, `latest` by default."""
    return name if ":" in name.rpartition("/")[2] else name + _DEFAULT_TAG


def check_name(asked: str, model: ServedModel) -> None:
    """Raise an error in Ollama's format for a request for another model, with the name of this one.

    Raises:
        ApiError: 404.
    """
    if full_name(asked) != full_name(model.name):
        raise ApiError(
            404,
            f"model '{asked[:200]}' not found; this server has '{model.name}'",
            code="model_not_found",
            param="model",
        )


def tags_card(model: ServedModel, weights: str) -> dict[str, Any]:
    """Return the model's entry in /api/tags.

    Args:
        model: the served model.
        weights: name of its current weights.
    """
    name = full_name(model.name)
    return {
        "name": name,
        "model": name,
        "modified_at": rfc3339(model.created_unix),
        "size": _size_bytes(model),
        "digest": hashlib.sha256(f"{name} {weights}".encode()).hexdigest(),
        "details": _details(model),
    }


def running_card(model: ServedModel, weights: str) -> dict[str, Any]:
    """Return the model's entry in /api/ps."""
    card = tags_card(model, weights)
    del card["modified_at"]
    longest = model.limits.max_sequence_tokens
    return {**card, "expires_at": _NEVER_UNLOADED, "context_length": longest or 0}


def show_card(model: ServedModel) -> dict[str, Any]:
    """Return the answer of /api/show; unknown values are omitted."""
    facts = {
        "general.architecture": _FAMILY,
        "general.parameter_count": model.num_parameters,
        f"{_FAMILY}.context_length": model.limits.max_sequence_tokens,
        f"{_FAMILY}.vocab_size": model.limits.vocab_size,
    }
    return {
        "template": _go_template(),
        "parameters": _parameters(model),
        "details": _details(model),
        "model_info": {name: fact for name, fact in facts.items() if fact is not None},
        "capabilities": ["completion"],
        "modified_at": rfc3339(model.created_unix),
    }


def _details(model: ServedModel) -> dict[str, Any]:
    return {
        "parent_model": "",
        "format": "phi4",
        "family": _FAMILY,
        "families": [_FAMILY],
        "parameter_size": _short(model.num_parameters),
        "quantization_level": model.weights_type or "",
    }


def _size_bytes(model: ServedModel) -> int:
    """Return the size of the weights; 0 if unknown."""
    return (model.num_parameters or 0) * _BYTES.get(model.weights_type or "", 0)


def _short(count: int | None) -> str:
    """Format a number of parameters as Ollama does."""
    if count is None:
        return ""
    for unit, name in ((10**9, "B"), (10**6, "M"), (10**3, "K")):
        if count >= unit:
            return f"{count / unit:.1f}{name}"
    return str(count)


def _go_template() -> str:
    """Return the chat format as a Modelfile's TEMPLATE."""
    header, _, ending = CHAT_FORMAT.partition("{content}")
    asked = ending + header.format(role=Role.ASSISTANT.value)
    return (
        "{{- range $i, $_ := .Messages }}{{- $last := eq (len (slice $.Messages $i)) 1 }}"
        + header.format(role="{{ .Role }}")
        + "{{ .Content }}{{ if not $last }}"
        + ending
        + '{{ else if ne .Role "assistant" }}'
        + asked
        + "{{ end }}{{ end }}"
    )


def _parameters(model: ServedModel) -> str:
    """Return the default sampling parameters as a Modelfile's PARAMETER lines."""
    defaults = OllamaOptions()
    names = ("temperature", "top_p", "top_k", "min_p")
    said = [f"{name:<30} {getattr(defaults, name)}" for name in names]
    ends = (model.tokenizer.bytes_of(end).decode() for end in sorted(end_ids(model.tokenizer)))
    return "\n".join([*said, *(f'{"stop":<30} "{end}"' for end in ends)])
