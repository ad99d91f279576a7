"""Flatten a recipe to parameters."""

import json
from typing import Any

from phi4.config import Recipe


def recipe_params(recipe: Recipe) -> dict[str, Any]:
    """Return every key of a recipe by its dotted name; tables and lists as JSON text."""
    tree = recipe.model_dump(mode="json")
    return {
        f"{section}.{key}": json.dumps(value) if isinstance(value, list | dict) else value
        for section, table in tree.items()
        for key, value in table.items()
    }
