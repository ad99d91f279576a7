"""Recipes are read strictly, wrong keys get the nearest name, and what is written reads back."""

import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phi4.config import (
    Recipe,
    changed_keys,
    dump_toml,
    identity_hash,
    key_kinds,
    load_recipe,
    parse_recipe,
    with_overrides,
)
from phi4.errors import ConfigError
from tests.support.recipes import value_of

names = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), min_size=1, max_size=20)
counts = st.integers(1, 2**40)
sources = st.lists(
    st.fixed_dictionaries(
        {"name": names, "path": names, "weight": st.floats(0, 1e6, allow_subnormal=False)}
    ),
    max_size=4,
)
recipes = st.fixed_dictionaries(
    {},
    optional={
        "model": st.fixed_dictionaries(
            {}, optional={"num_layers": counts, "rope_theta": st.floats(1.001, 1e9)}
        ),
        "tokenizer": st.fixed_dictionaries({}, optional={"path": names}),
        "data": st.fixed_dictionaries(
            {}, optional={"sources": sources, "document_mask": st.booleans()}
        ),
        "optim": st.fixed_dictionaries({}, optional={"learning_rate": st.floats(1e-12, 1e3)}),
        "parallel": st.fixed_dictionaries(
            {}, optional={"layers_per_stage": st.lists(st.integers(0, 99), max_size=8)}
        ),
        "run": st.fixed_dictionaries({}, optional={"dir": names, "name": names}),
    },
).map(parse_recipe)


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


@given(recipes)
def test_written_recipe_reads_back(recipe: Recipe) -> None:
    assert parse_recipe(tomllib.loads(dump_toml(recipe))) == recipe


@given(recipes)
def test_no_override_changes_nothing(recipe: Recipe) -> None:
    assert with_overrides(recipe, []) == recipe


def test_written_recipe_names_every_key_that_has_a_value() -> None:
    recipe = Recipe()
    tree = tomllib.loads(dump_toml(recipe))
    written = {f"{section}.{key}" for section, table in tree.items() for key in table}
    unset = {key for key in key_kinds() if value_of(recipe, key) is None}
    assert written == set(key_kinds()) - unset
    assert unset


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"model": {"num_layer": 3}}, "unknown key model.num_layer; did you mean model.num_layers"),
        ({"modle": {}}, "unknown key modle; did you mean model?"),
        ({"optim": {"lr": 1e-3}}, "unknown key optim.lr"),
        ({"model": {"steps": 3}}, "unknown key model.steps; did you mean run.steps?"),
        (
            {"data": {"sources": [{"name": "a", "path": "b", "wieght": 1.0}]}},
            "unknown key data.sources.0.wieght; did you mean data.sources.0.weight?",
        ),
        ({"data": {"sources": [{"name": "a"}]}}, "data.sources.0.path is required"),
        ({"model": {"num_layers": "8"}}, "model.num_layers: input should be a valid integer"),
        ({"model": {"num_layers": True}}, "model.num_layers: input should be a valid integer"),
        ({"model": {"num_layers": 0}}, "model.num_layers: input should be greater than or equal"),
        ({"optim": {"learning_rate": float("inf")}}, "input should be a finite number, got inf"),
        ({"parallel": {"sequence": "yes"}}, "parallel.sequence: input should be a valid boolean"),
        ({"parallel": {"layers_per_stage": [1, "2"]}}, "parallel.layers_per_stage.1: input should"),
        (
            {"parallel": {"layers_per_stage": 4}},
            "layers_per_stage must be an array in brackets, got",
        ),
        ({"precision": {"dtype": "fp8"}}, "precision.dtype: input should be 'fp32' or 'bf16'"),
        ({"model": 3}, "model must be a table, got 3"),
    ],
)
def test_wrong_tree_is_refused(tree: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse_recipe(tree)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_all_wrong_keys_are_named_at_once() -> None:
    with pytest.raises(ConfigError) as error:
        parse_recipe({"model": {"num_layer": 3, "hidden_size": "5"}, "run": {"steps": 0}})
    for key in ("model.num_layer", "model.hidden_size", "run.steps"):
        assert key in str(error.value)


@pytest.mark.parametrize("text", ["a = ", "[run]\nsteps = on", "a = 1\na = 2"])
def test_file_that_is_not_toml_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match=r"r\.toml is not valid TOML"):
        load_recipe(write(tmp_path / "r.toml", text))


def test_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist; recipes that come with phi4 are in"):
        load_recipe(tmp_path / "r.toml")
    with pytest.raises(ConfigError, match="is a directory"):
        load_recipe(tmp_path)


def test_every_key_has_a_kind() -> None:
    kinds = key_kinds()
    assert {section for section in Recipe.model_fields} == {key.split(".")[0] for key in kinds}
    assert kinds["model.num_layers"] == kinds["run.seed"] == "identity"
    assert kinds["optim.learning_rate"] == kinds["data.sources"] == "schedule"
    assert kinds["parallel.tensor"] == kinds["run.dir"] == "free"


CHANGES = {
    "identity": ("model.num_layers=41", "run.seed=1", "optim.beta2=0.9", "data.unit_tokens=512"),
    "schedule": ("optim.learning_rate=1.0", "batch.global_batch_size=9", "run.steps=3"),
    "free": ("parallel.tensor=2", "run.dir=runs/b", "kernels.rope=torch", "checkpoint.keep=9"),
}


@pytest.mark.parametrize(
    ("kind", "override"), [(kind, line) for kind, lines in CHANGES.items() for line in lines]
)
def test_change_is_listed_by_kind_and_the_hash_covers_identity_only(
    kind: str, override: str
) -> None:
    old = Recipe()
    new = with_overrides(old, [override])
    key = override.partition("=")[0]
    changes = changed_keys(old, new)
    assert changes.pop(kind) == {key: (value_of(old, key), value_of(new, key))}
    assert all(not others for others in changes.values())
    assert (identity_hash(new) != identity_hash(old)) == (kind == "identity")


def test_sources_may_move_and_nothing_else_of_them_goes_unnoticed() -> None:
    def sources(**changes: object) -> Recipe:
        source = {"name": "web", "path": "here/web", "weight": 1.0, **changes}
        return parse_recipe({"data": {"sources": [source]}})

    moved = changed_keys(sources(), sources(path="there/web"))
    assert list(moved["free"]) == ["data.sources"] and not moved["schedule"]
    for change in ({"weight": 2.0}, {"name": "w"}, {"kind": "windows"}, {"max_epochs": 3.0}):
        changes = changed_keys(sources(), sources(path="there/web", **change))
        assert list(changes["schedule"]) == ["data.sources"] and not changes["free"]


def test_recipe_is_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Recipe().run.steps = 3
