"""Reject unsupported fields of a request by name; no field that matters is ignored.

This module has the list of fields that clients send and that do not affect the answer.
"""

from collections.abc import Mapping

from pydantic import BaseModel

from phi4.serve.api_errors import bad_request

_WITHOUT_EFFECT = frozenset(
    (
        "metadata",
        "prompt_cache_key",
        "prompt_cache_retention",
        "safety_identifier",
        "service_tier",
        "store",
        "user",
    )
)
"""Fields about the account, billing or caching: any value is accepted."""

_NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "add_generation_prompt": (True,),
    "function_call": ("auto", "none"),
    "length_penalty": (1,),
    "modalities": (["text"],),
    "repetition_penalty": (1,),
    "response_format": ({"type": "text"},),
    "tool_choice": ("auto", "none"),
}
"""Values without effect, for fields that are otherwise not supported."""

_SHOWN_CHARACTERS = 60


def check_supported(fields: BaseModel, place: str = "") -> None:
    """Raise an error for fields that a model does not declare, unless their value has no effect.

    Args:
        fields: keeps undeclared fields (`extra="allow"`).
        place: prefix of the name, such as `messages.0.`.

    Raises:
        ApiError: 400, `unsupported_parameter`, with the name of the field.
    """
    for name, value in (fields.model_extra or {}).items():
        if name not in _WITHOUT_EFFECT and value and value not in _NEUTRAL.get(name, ()):
            refuse(place + name, value)


def refuse(name: str, value: object) -> None:
    """Raise the error for a field.

    Raises:
        ApiError: 400, `unsupported_parameter`.
    """
    raise bad_request(
        f"{name}={str(value)[:_SHOWN_CHARACTERS]!r} is not supported by this server; remove it",
        param=name,
        code="unsupported_parameter",
    )
