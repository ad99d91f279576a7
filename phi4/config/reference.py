"""Render type, range, default, kind and meaning of every key of the recipe as text.

All of it is read from the JSON schema that pydantic generates from `schema.py`, so `phi4 recipe
keys` and docs/recipe.md always agree with what a recipe is checked against.
"""

import json
from dataclasses import dataclass
from typing import Any

from phi4.config.fields import Kind
from phi4.config.overrides import nearest
from phi4.config.schema import Recipe
from phi4.errors import ConfigError

KIND_TEXTS: dict[Kind, str] = {
    "identity": "part of the model's identity; cannot change when a run resumes",
    "schedule": "may change when a run resumes with `--change`; the run's history records the step",
    "free": "may change whenever a run resumes: layout, kernels, files",
}
_TYPES = {"integer": "integer", "number": "number", "boolean": "true or false", "string": "text"}
_BOUNDS = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}


@dataclass(frozen=True)
class KeyReference:
    """One key of the recipe.

    Attributes:
        key: dotted, `optim.learning_rate`; of a table in an array `data.sources[].name`.
        type: with its range, in words.
        required: there is no default.
        default: None where the key may be unset and is, and where it is required.
        kind: whether it may change when a run resumes.
        text: its docstring, in one line.
    """

    key: str
    type: str
    required: bool
    default: Any
    kind: Kind
    text: str

    @property
    def default_text(self) -> str:
        """The default as an override would write it; `required` where there is none."""
        if self.required:
            return "required"
        return "None" if self.default is None else json.dumps(self.default)


@dataclass(frozen=True)
class SectionReference:
    """A section of the recipe, or the tables of an array in it (`data.sources[]`)."""

    name: str
    text: str
    keys: tuple[KeyReference, ...]

    @property
    def header(self) -> str:
        """The table's header in TOML syntax."""
        return f"[[{self.name[:-2]}]]" if self.name.endswith("[]") else f"[{self.name}]"


def reference() -> tuple[SectionReference, ...]:
    """Return all sections in the order of the schema; array tables follow the section that holds
    them."""
    schema = Recipe.model_json_schema()
    sections: list[SectionReference] = []
    listed: set[str] = set()
    for name, field in schema["properties"].items():
        table = _table_of(field, schema)
        sections.append(_section(name, table))
        for key, node in table["properties"].items():
            items = node.get("items", {})
            # data.sources and data.held_out hold tables of the same type, which are listed once.
            if "$ref" in items and items["$ref"] not in listed:
                listed.add(items["$ref"])
                sections.append(_section(f"{name}.{key}[]", _table_of(items, schema)))
    return tuple(sections)


def find(name: str) -> tuple[SectionReference, ...]:
    """Return the section of this name with its tables, or the section of a key with that key alone.

    Args:
        name: `optim`, `data.sources` or `optim.learning_rate`.

    Raises:
        ConfigError: no section or key has that name; the message names the nearest key.
    """
    sections = reference()
    known = {key.key: section for section in sections for key in section.keys}
    found = [s for s in sections if s.name in (name, f"{name}[]") or s.name.startswith(f"{name}.")]
    if name in known and not found:
        section = known[name]
        only = tuple(key for key in section.keys if key.key == name)
        found = [SectionReference(section.name, section.text, only)]
    if not found:
        names = [*(section.name for section in sections), *known]
        remedy = nearest(name, names) or "; `phi4 recipe keys` lists all"
        raise ConfigError(f"the recipe has no section or key {name!r}{remedy}")
    return tuple(found)


def _section(name: str, table: dict[str, Any]) -> SectionReference:
    required = table.get("required", ())
    keys = tuple(
        KeyReference(
            key=f"{name}.{key}",
            type=_type(node),
            required=key in required,
            default=node.get("default"),
            kind=node["kind"],
            text=_line(node),
        )
        for key, node in table["properties"].items()
    )
    return SectionReference(name, _line(table), keys)


def _table_of(node: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    """Return the table that a node refers to."""
    return schema["$defs"][node["$ref"].rpartition("/")[2]]


def _line(node: dict[str, Any]) -> str:
    """Return the docstring of a node in one line."""
    return " ".join(node.get("description", "").split())


def _type(node: dict[str, Any]) -> str:
    """Return a node's type and range in words."""
    if "anyOf" in node:
        options = [_type(option) for option in node["anyOf"] if option.get("type") != "null"]
        return " | ".join([*options, "None"])
    if "enum" in node:
        return " | ".join(node["enum"])
    if "prefixItems" in node:
        return f"[{', '.join(map(_type, node['prefixItems']))}]"
    if node["type"] == "array" and "$ref" in node["items"]:
        return "array of tables"
    if node["type"] == "array":
        return f"array, each {_type(node['items'])}"
    bounds = [f"{sign} {node[name]}" for name, sign in _BOUNDS.items() if name in node]
    if "pattern" in node:
        bounds.append(f"matching {node['pattern']}")
    if node.get("minLength"):
        bounds.append("not empty")
    return " ".join([_TYPES[node["type"]], ", ".join(bounds)]).strip()
