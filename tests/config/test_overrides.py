"""Overrides are read as the type of their key, and every value can be written as one."""

import types
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import pytest
import tomli_w
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from phi4.config import Recipe, key_kinds, load_recipe, parse_recipe, with_overrides
from phi4.errors import ConfigError
from tests.support.recipes import value_of

UNSET = [key for key in key_kinds() if value_of(Recipe(), key) is None]
"""Keys that may be unset."""
texts = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), min_size=1, max_size=20)


def values_of(key: str) -> st.SearchStrategy:
    """What a key may be set to: its type, its range."""
    section, name = key.split(".")
    field = Recipe.model_fields[section].annotation.model_fields[name]
    if key == "tokenizer.sha256":
        return st.from_regex(r"[0-9a-f]{64}", fullmatch=True)
    if key in ("data.sources", "data.held_out"):
        return st.lists(st.fixed_dictionaries({"name": texts, "path": texts}), max_size=2)
    if key == "data.skip_windows":
        window = st.tuples(st.integers(0, 99), st.integers(1, 99)).map(list)
        return st.lists(window, max_size=2)
    bounds = {
        limit: getattr(constraint, limit)
        for constraint in field.metadata
        for limit in ("ge", "gt", "le", "lt")
        if hasattr(constraint, limit)
    }
    return _of_type(field.annotation, bounds)


def _of_type(annotation: Any, bounds: dict[str, float]) -> st.SearchStrategy:
    if get_origin(annotation) in (Union, types.UnionType):
        return _of_type(get_args(annotation)[0], bounds)
    if get_origin(annotation) is Annotated:
        return st.lists(st.integers(0, 99), max_size=4)
    if get_origin(annotation) is Literal:
        return st.sampled_from(get_args(annotation))
    low = bounds.get("ge", bounds.get("gt"))
    if annotation is int:
        return st.integers(low, 2**60)
    if annotation is float:
        high = bounds.get("le", bounds.get("lt", 1e12))
        exclude = {"exclude_min": "gt" in bounds, "exclude_max": "lt" in bounds}
        return st.floats(low, high, **exclude)
    return {str: texts, bool: st.booleans()}[annotation]


@pytest.mark.parametrize("key", key_kinds())
@settings(max_examples=10)
@given(st.data())
def test_every_value_of_every_key_can_be_an_override(key: str, data: st.DataObject) -> None:
    value = data.draw(values_of(key))
    section, name = key.split(".")
    expected = parse_recipe({section: {name: value}})
    as_toml = tomli_w.dumps({"v": value}).partition("=")[2]
    assert with_overrides(Recipe(), [f"{key}={as_toml}"]) == expected
    if not isinstance(value, list):
        # Spaces around the text and quotes around all of it are the override's; see its module.
        assume(value == str(value).strip() if isinstance(value, str) else True)
        assume(not str(value).startswith(("'", '"')))
        assume(key not in UNSET or value not in ("null", "none", "None"))
        assert with_overrides(Recipe(), [f"{key}={value}"]) == expected


@pytest.mark.parametrize("null", ["null", "none", "None"])
def test_null_resets_every_key_that_may_be_unset(null: str) -> None:
    tree = {
        "tokenizer": {"path": "a", "sha256": "0" * 64},
        "data": {"continue_from": "a", "cache_dir": "a", "reference_cache": "a"},
        "dpo": {"reference": "a"},
        "parallel": {"layers_per_stage": [40]},
        "run": {"name": "a", "init_from": "a"},
        "tracking": {"uri": "a", "experiment": "a", "peak_tflops": 1.0, "sweep": "a"},
    }
    recipe = parse_recipe(tree)
    assert all(value_of(recipe, key) is not None for key in UNSET)
    assert with_overrides(recipe, [f"{key}={null}" for key in UNSET]) == Recipe()


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("parallel.tensor=2", "parallel.tensor", 2),
        (" parallel.tensor = 2 ", "parallel.tensor", 2),
        ("optim.learning_rate=3e-4", "optim.learning_rate", 3e-4),
        ("parallel.sequence=true", "parallel.sequence", True),
        ("parallel.layers_per_stage=[1, 2]", "parallel.layers_per_stage", (1, 2)),
        ("run.dir=runs/a", "run.dir", "runs/a"),
        ("run.dir='runs/a'", "run.dir", "runs/a"),
        ("tracking.uri=http://host:5000/?a=b", "tracking.uri", "http://host:5000/?a=b"),
        ("precision.dtype=fp32", "precision.dtype", "fp32"),
        ("run.name=12345", "run.name", "12345"),
        ("run.name=1e5", "run.name", "1e5"),
        ("run.name=true", "run.name", "true"),
        ("run.name=[1]", "run.name", "[1]"),
        ("run.name='null'", "run.name", "null"),
        ("run.name='12' or \"13\"", "run.name", "'12' or \"13\""),
        ("run.dir=2024-11-29", "run.dir", "2024-11-29"),
        ("run.dir=null", "run.dir", "null"),
        ("parallel.sequence=True", "parallel.sequence", True),
        ("run.steps=423_855", "run.steps", 423_855),
        ("optim.learning_rate=1", "optim.learning_rate", 1.0),
    ],
)
def test_override_sets_one_key(tmp_path: Path, override: str, key: str, value: object) -> None:
    file = tmp_path / "r.toml"
    file.write_text("[run]\nseed = 7\n")
    recipe = load_recipe(file, [override])
    assert value_of(recipe, key) == value
    assert recipe.run.seed == 7
    assert with_overrides(load_recipe(file), [override]) == recipe


def test_last_override_of_a_key_holds() -> None:
    assert with_overrides(Recipe(), ["run.steps=2", "run.steps=3"]).run.steps == 3


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("parallel.tenser=2", "unknown key 'parallel.tenser'; did you mean parallel.tensor?"),
        ("tensor=2", "unknown key 'tensor'"),
        ("parallel.tensor", "expected section.key=value"),
        (
            "parallel.tensor=two",
            "parallel.tensor: input should be a valid integer, got 'two'; use a whole number",
        ),
        ("parallel.tensor=null", "got 'null'; use a whole number such as 8"),
        ("parallel.tensor=1e3", "got '1e3'; use a whole number such as 8"),
        ("parallel.sequence=yes", "a valid boolean, got 'yes'; use true or false"),
        ("optim.learning_rate=fast", "a valid number, got 'fast'; use a number such as 3e-4"),
        ("optim.learning_rate=nan", "a finite number, got nan"),
        ("parallel.layers_per_stage=1,2", "must be an array in brackets, got '1,2'"),
        ("parallel.layers_per_stage=[1]\nx=2", "must be an array in brackets, got '[1]\\nx=2'"),
        ("precision.dtype=fp8", "input should be 'fp32' or 'bf16', got 'fp8'"),
        ("tokenizer.sha256=abc", "tokenizer.sha256: string should match pattern"),
        ("run.dir=", "run.dir: "),
    ],
)
def test_wrong_override_is_refused(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        with_overrides(Recipe(), [override])
    assert message in str(error.value)


def test_override_of_a_section_that_is_no_table_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "r.toml"
    file.write_text("run = 3\n")
    with pytest.raises(ConfigError, match=r"\[run\] is not a table"):
        load_recipe(file, ["run.steps=2"])
