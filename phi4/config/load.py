"""Read, override, write and compare recipes.

The format is TOML because it is typed, in the standard library and diffable; `3e-4` is a number in
it and `on` is not a boolean. Overrides are parsed in `overrides`.
"""

import hashlib
import json
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import tomli_w
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from phi4.config.fields import Kind
from phi4.config.overrides import apply_overrides, nearest
from phi4.config.schema import Recipe, key_kinds, source_key_kinds
from phi4.errors import ConfigError


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a TOML recipe and apply `section.key=value` overrides. Cross-rules are not checked here.

    Raises:
        ConfigError: the file is missing or not TOML, a key is unknown (names the nearest one), a
            value has the wrong type or range; all of them at once.
    """
    tree = read_toml(path, "recipe")
    return parse_recipe(apply_overrides(tree, overrides), where=str(path))


def read_toml(path: str | Path, kind: Literal["recipe", "sweep"]) -> dict[str, Any]:
    """Read a TOML file as a plain tree.

    Args:
        path: path of the file.
        kind: what it is, for the message.

    Raises:
        ConfigError: the file is missing, a directory or not TOML.
    """
    path = Path(path)
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(
            f"{kind} {path} does not exist; {kind}s that come with phi4 are in examples/{kind}s/"
        ) from None
    except IsADirectoryError:
        raise ConfigError(f"{kind} {path} is a directory; give a .toml file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{kind} {path} is not valid TOML: {error}") from None


def recipe_from_toml(text: str, where: str) -> Recipe:
    """Parse the text of a recipe, for example one kept in a checkpoint.

    Raises:
        ConfigError: as `load_recipe`.
    """
    try:
        return parse_recipe(tomllib.loads(text), where=where)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"recipe {where} is not valid TOML: {error}") from None


def with_overrides(recipe: Recipe, overrides: Sequence[str]) -> Recipe:
    """Return the recipe with `section.key=value` overrides applied."""
    return parse_recipe(apply_overrides(_plain(recipe), overrides), where="overrides")


def parse_recipe(tree: dict[str, Any], where: str = "recipe") -> Recipe:
    """Validate a plain tree.

    Raises:
        ConfigError: as `load_recipe`.
    """
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        lines = [f"{where}: {_explain(item)}" for item in error.errors()]
        raise ConfigError("\n".join(lines)) from None


def dump_toml(recipe: Recipe) -> str:
    """Return the fully resolved recipe as TOML; keys that are None are left out."""
    return tomli_w.dumps(_plain(recipe))


def identity_hash(recipe: Recipe) -> str:
    """Return the sha256 of the identity keys: equal for runs that train the same model."""
    identity = {key: value for key, value in _flat(recipe).items() if _KINDS[key] == "identity"}
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def changed_keys(old: Recipe, new: Recipe) -> dict[Kind, dict[str, tuple[Any, Any]]]:
    """Return the keys that differ, by kind: {kind: {dotted key: (old value, new value)}}."""
    before, after = _flat(old), _flat(new)
    changes: dict[Kind, dict[str, tuple[Any, Any]]] = {"identity": {}, "schedule": {}, "free": {}}
    for key, value in after.items():
        if before[key] != value:
            moved = key == "data.sources" and _bound(before[key]) == _bound(value)
            changes["free" if moved else _KINDS[key]][key] = (before[key], value)
    return changes


_KINDS = key_kinds()
_SOURCE_KINDS = source_key_kinds()
_SHAPES = {"model_type": "a table", "tuple_type": "an array in brackets"}
_REMEDIES = {
    "bool_type": "; use true or false",
    "int_type": "; use a whole number such as 8",
    "float_type": "; use a number such as 3e-4",
    "string_type": "; put the text in quotes",
}


def _bound(sources: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return sources without their free keys."""
    return [{k: v for k, v in source.items() if _SOURCE_KINDS[k] != "free"} for source in sources]


def _flat(recipe: Recipe) -> dict[str, Any]:
    tree = recipe.model_dump(mode="json")
    return {f"{s}.{k}": value for s, table in tree.items() for k, value in table.items()}


def _plain(recipe: Recipe) -> dict[str, Any]:
    return recipe.model_dump(mode="json", exclude_none=True)


def _explain(item: ErrorDetails) -> str:
    location = [str(part) for part in item["loc"]]
    key = ".".join(location)
    if item["type"] == "extra_forbidden":
        if len(location) > 2:
            known = [".".join([*location[:-1], name]) for name in _SOURCE_KINDS]
        else:
            known = [*_KINDS, *Recipe.model_fields]
        return f"unknown key {key}{nearest(key, known)}"
    if item["type"] == "missing":
        return f"{key} is required"
    if item["type"] in _SHAPES:
        return f"{key} must be {_SHAPES[item['type']]}, got {item['input']!r}"
    got = item.get("input")
    shown = "" if isinstance(got, dict) else f", got {got!r}"
    remedy = _REMEDIES.get(item["type"], "")
    return f"{key}: {item['msg'][0].lower()}{item['msg'][1:]}{shown}{remedy}"
