"""The reference of the recipe has every key of the schema, with what the schema says of it."""

from typing import Any

import pytest

from phi4.config import Recipe, key_kinds
from phi4.config.reference import KIND_TEXTS, KeyReference, find, reference
from phi4.config.schema import source_key_kinds
from phi4.errors import ConfigError

SECTIONS = {section.name: section for section in reference()}
KEYS = {key.key: key for section in SECTIONS.values() for key in section.keys}


def test_every_key_is_there_with_its_kind() -> None:
    of_sources = {f"data.sources[].{name}": kind for name, kind in source_key_kinds().items()}
    assert {name: key.kind for name, key in KEYS.items()} == key_kinds() | of_sources
    assert set(KIND_TEXTS) == set(key_kinds().values())


def test_defaults_are_those_of_an_empty_recipe() -> None:
    tree = Recipe().model_dump(mode="json")
    flat = {f"{s}.{name}": value for s, table in tree.items() for name, value in table.items()}
    assert {name: KEYS[name].default for name in flat} == flat


def test_every_section_and_key_has_a_meaning() -> None:
    told: dict[str, Any] = SECTIONS | KEYS
    assert [name for name, item in told.items() if not item.text] == []


@pytest.mark.parametrize(
    ("name", "expected", "default"),
    [
        ("optim.learning_rate", "number > 0", "0.0003"),
        ("dpo.label_smoothing", "number >= 0, < 0.5", "0.0"),
        ("checkpoint.host_memory_share", "number > 0, <= 1", "0.25"),
        ("data.document_mask", "true or false", "true"),
        ("data.sources", "array of tables", "[]"),
        ("data.sources[].name", "text not empty", "required"),
        ("data.sources[].overlong", "cut | truncate | drop | None", "None"),
        ("data.skip_windows", "array, each [integer >= 0, integer >= 1]", "[]"),
        ("parallel.layers_per_stage", "array, each integer >= 0 | None", "None"),
        ("tokenizer.sha256", "text matching ^[0-9a-f]{64}$ | None", "None"),
    ],
)
def test_type_has_its_range(name: str, expected: str, default: str) -> None:
    assert (KEYS[name].type, KEYS[name].default_text) == (expected, default)


def found(name: str) -> list[str]:
    return [key.key for section in find(name) for key in section.keys]


def keys_of(section: str) -> list[str]:
    return [key.key for key in SECTIONS[section].keys]


def test_section_or_key_is_found_by_its_name() -> None:
    assert found("optim") == keys_of("optim")
    assert found("data") == keys_of("data") + keys_of("data.sources[]")
    assert found("data.sources") == keys_of("data.sources[]")
    assert found("data.sources[].name") == ["data.sources[].name"]
    assert found("model.num_layers") == ["model.num_layers"]


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("optm", "did you mean optim?"),
        ("optim.lerning_rate", "did you mean optim.learning_rate?"),
        ("learning_rate", "did you mean optim.learning_rate?"),
        ("xyzzy", "`phi4 recipe keys` lists all"),
    ],
)
def test_unknown_name_is_an_error_with_the_nearest(name: str, remedy: str) -> None:
    with pytest.raises(ConfigError) as error:
        find(name)
    assert str(error.value) == f"the recipe has no section or key {name!r}; {remedy}"


def test_header_is_that_of_the_table_in_a_file() -> None:
    assert SECTIONS["optim"].header == "[optim]"
    assert SECTIONS["data.sources[]"].header == "[[data.sources]]"


def test_empty_text_is_told_from_no_value() -> None:
    def shown(default: Any, required: bool = False) -> str:
        return KeyReference("a.b", "text", required, default, "free", "").default_text

    assert (shown(""), shown(None), shown(None, required=True)) == ('""', "None", "required")
