"""Base class of the recipe's sections, and the field function that declares a key's kind."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Kind = Literal["identity", "schedule", "free"]

Positive = Annotated[int, Field(ge=1)]
NonNegative = Annotated[int, Field(ge=0)]


def key(kind: Kind, default: Any = ..., **constraints: Any) -> Any:
    """Declare a key of this kind; the constraints are pydantic's."""
    return Field(default, json_schema_extra={"kind": kind}, **constraints)


class Section(BaseModel):
    """A frozen section of the recipe that rejects unknown keys and values of the wrong type."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )
