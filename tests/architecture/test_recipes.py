"""Every recipe that comes with phi4 loads, keeps the cross-rules and says what it needs."""

from pathlib import Path

import pytest

from phi4.config import check, load_recipe
from phi4.config.load import changed_keys
from phi4.stages import stage_of

RECIPES = sorted((Path(__file__).parents[2] / "examples" / "recipes").glob("**/*.toml"))


def test_there_are_recipes() -> None:
    assert {"tiny_pretrain", "phi4_14b_pretrain", "phi4_14b_midtrain_16k"} <= {
        path.stem for path in RECIPES
    }


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_loads_and_keeps_the_rules(path: Path) -> None:
    recipe = load_recipe(path)
    check(recipe, stage_rules=[stage_of(recipe).violations])


@pytest.mark.parametrize("world_size", [16, 64, 1920])
@pytest.mark.parametrize("suffix", ["", "_fp8"])
@pytest.mark.parametrize("name", ["phi4_14b_pretrain", "phi4_14b_midtrain_16k"])
def test_14b_recipe_fits_the_clusters(name: str, suffix: str, world_size: int) -> None:
    path = next(path for path in RECIPES if path.stem == name + suffix)
    check(load_recipe(path), world_size)


@pytest.mark.parametrize("name", ["phi4_14b_pretrain", "phi4_14b_midtrain_16k"])
def test_twin_in_fp8_differs_in_precision_and_directories(name: str) -> None:
    plain, fp8 = (
        load_recipe(next(path for path in RECIPES if path.stem == name + suffix))
        for suffix in ("", "_fp8")
    )
    changed = {key for by_key in changed_keys(plain, fp8).values() for key in by_key}
    directories = {"run.dir", "run.init_from", "data.continue_from"}
    assert "precision.fp8" in changed
    assert changed - directories == {key for key in changed if key.startswith("precision.")}


def test_14b_recipes_are_the_reports() -> None:
    pretrain, midtrain = (
        load_recipe(next(path for path in RECIPES if path.stem == name))
        for name in ("phi4_14b_pretrain", "phi4_14b_midtrain_16k")
    )
    weights = {source.name: source.weight for source in pretrain.data.sources}
    assert list(weights.values()) == [0.15, 0.15, 0.40, 0.20, 0.10]
    assert pretrain.optim.learning_rate == pytest.approx(10 * midtrain.optim.learning_rate)
    long = sum(s.weight for s in midtrain.data.sources if s.name not in weights)
    assert long == pytest.approx(0.3)
    assert sum(s.weight for s in midtrain.data.sources) == pytest.approx(1.0)
    for recipe, tokens in ((pretrain, 10e12), (midtrain, 250e9)):
        step_tokens = recipe.batch.global_batch_size * recipe.data.sequence_length
        assert step_tokens == 23_592_960
        assert recipe.run.steps == round(tokens / step_tokens)


def test_refusals_are_a_small_part_of_14b_mixtures() -> None:
    shares = {}
    for path in (path for path in RECIPES if path.stem.startswith("phi4_14b")):
        sources = load_recipe(path).data.sources
        total = sum(source.weight for source in sources)
        for source in sources:
            if source.name.startswith("unknown"):
                shares[path.stem] = source.weight / total
    # Tables 7 and 8 of the report, and ours.
    assert shares == {
        "phi4_14b_dpo_pivotal": pytest.approx(0.012, abs=0.0005),
        "phi4_14b_dpo_judge": pytest.approx(0.052, abs=0.0005),
        "phi4_14b_sft": pytest.approx(0.02),
    }
