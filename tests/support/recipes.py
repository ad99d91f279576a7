"""Keys of a recipe by their dotted names."""

from typing import Any

from phi4.config import Recipe


def value_of(recipe: Recipe, key: str) -> Any:
    """The value of `section.key`."""
    section, name = key.split(".")
    return getattr(getattr(recipe, section), name)
