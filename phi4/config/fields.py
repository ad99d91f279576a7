"""What every section of the recipe is made of: frozen tables, and keys that say their kind."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Kind = Literal["identity", "schedule", "free"]

Positive = Annotated[int, Field(ge=1)]
NonNegative = Annotated[int, Field(ge=0)]


def key(kind: Kind, default: Any = ..., **constraints: Any) -> Any:
    """A key of this kind; constraints are pydantic's."""
    return Field(default, json_schema_extra={"kind": kind}, **constraints)


class Section(BaseModel):
    """A frozen table of the recipe that refuses unknown keys and values of another type."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )
