"""Apply `section.key=value` overrides; the key's type determines how the value is parsed.

Values of string keys are taken literally, so `run.name=12345` is a string; enclosing TOML quotes
are removed. `null` unsets an optional key. A value that cannot be parsed as the key's type is left
as text, so that the schema reports it together with all other errors.
"""

import difflib
import tomllib
import types
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from phi4.config.schema import key_kinds, section_keys
from phi4.errors import ConfigError

_BOOLEANS = {"true": True, "false": False}
_NULLS = ("null", "none", "None")


def apply_overrides(tree: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Return a copy of a recipe's plain tree with the overridden keys set; the last override of a
    key wins.

    Raises:
        ConfigError: an override is not `section.key=value`, names an unknown key (the message names
            the nearest one), or its section is not a table in the tree.
    """
    tree = {key: dict(value) if isinstance(value, dict) else value for key, value in tree.items()}
    known = key_kinds()
    for override in overrides:
        key, separator, text = override.partition("=")
        key = key.strip()
        if not separator:
            raise ConfigError(f"override {override!r}: expected section.key=value")
        if key not in known:
            raise ConfigError(f"override {override!r}: unknown key {key!r}{nearest(key, known)}")
        section, name = key.split(".")
        if not isinstance(tree.setdefault(section, {}), dict):
            raise ConfigError(f"override {override!r}: [{section}] is not a table in the recipe")
        field = section_keys(section)[name]
        tree[section][name] = _read(text.strip(), field.annotation)
    return tree


def nearest(key: str, known: Iterable[str]) -> str:
    """Return `; did you mean X?` for the closest known key, or an empty string."""
    known = list(known)
    name = key.rpartition(".")[2]
    names = {full.rpartition(".")[2]: full for full in known}
    if name in names:
        return f"; did you mean {names[name]}?"
    match = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    if not match:
        close = difflib.get_close_matches(name, list(names), n=1, cutoff=0.6)
        match = [names[found] for found in close]
    return f"; did you mean {match[0]}?" if match else ""


def _read(text: str, annotation: Any) -> Any:
    """Return the value that a text denotes for a field of this type, or the text if it cannot be
    parsed."""
    if get_origin(annotation) in (Union, types.UnionType):
        (annotation,) = (option for option in get_args(annotation) if option is not type(None))
        if text in _NULLS:
            return None
    if get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    if annotation is bool:
        return _BOOLEANS.get(text.lower(), text)
    if annotation is str or get_origin(annotation) is Literal:
        return _toml(text) if text[:1] in ("'", '"') else text
    try:
        if annotation is int:
            return int(text, 0)
        if annotation is float:
            return float(text)
    except ValueError:
        return text
    return _toml(text)


def _toml(text: str) -> Any:
    """Return the text parsed as one TOML value, or the text itself."""
    try:
        table = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    # More than one key: the text continued after its first line.
    return table["value"] if len(table) == 1 else text
