"""What is refused of a request's fields: each by its name, and none is ignored that would matter.

The one list of fields that clients send and that have no effect on the answer stands here.
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
"""They are about the account, the bill or a cache: any value of them is accepted."""

_NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "add_generation_prompt": (True,),
    "function_call": ("auto", "none"),
    "length_penalty": (1,),
    "modalities": (["text"],),
    "repetition_penalty": (1,),
    "response_format": ({"type": "text"},),
    "tool_choice": ("auto", "none"),
}
"""Values that ask for what is done anyway, of fields that are not supported otherwise."""

_SHOWN_CHARACTERS = 60


def check_supported(fields: BaseModel, place: str = "") -> None:
    """Refuse fields that a model does not declare, unless their value asks for nothing.

    Args:
        fields: keeps what it does not declare (`extra="allow"`).
        place: goes before the name, as `messages.0.`.

    Raises:
        ApiError: 400, `unsupported_parameter`, with the name of the field.
    """
    for name, value in (fields.model_extra or {}).items():
        if name not in _WITHOUT_EFFECT and value and value not in _NEUTRAL.get(name, ()):
            refuse(place + name, value)


def refuse(name: str, value: object) -> None:
    """Refuse a field.

    Raises:
        ApiError: 400, `unsupported_parameter`.
    """
    raise bad_request(
        f"{name}={str(value)[:_SHOWN_CHARACTERS]!r} is not supported by this server; leave it out",
        param=name,
        code="unsupported_parameter",
    )
