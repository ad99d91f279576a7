"""What exceeds its card is refused with changes that do fit."""

from pathlib import Path

import pytest

from phi4.config import load_recipe, with_overrides
from phi4.errors import ConfigError, LayoutError
from phi4.plan import CARDS, card_named, check_fit, make_plan
from phi4.plan.fit import MOST_REMEDIES, fullest_stage, remedies

RECIPES = Path(__file__).parents[2] / "examples" / "recipes"
H100 = CARDS["h100"]
ON_EIGHT = {
    "phi4_14b_pretrain": [],
    "phi4_14b_midtrain_16k": [
        "parallel.context=1",
        "parallel.pipeline=4",
        "parallel.layers_per_stage=[10,10,11,9]",
        "recompute.granularity=full",
    ],
}
"""Overrides that the recipes name for 8 GPUs."""
WHOLE = (
    *("parallel.pipeline=1", "parallel.virtual_pipeline=1", "parallel.overlap_p2p=false"),
    "parallel.layers_per_stage=[40]",
)
"""No pipeline."""


def recipe_of(name: str):
    return load_recipe(RECIPES / f"{name}.toml")


@pytest.mark.parametrize("num_gpus", [8, 64, 1920])
@pytest.mark.parametrize("name", ON_EIGHT)
def test_14b_recipes_fit_their_clusters(name: str, num_gpus: int) -> None:
    recipe = with_overrides(recipe_of(name), ON_EIGHT[name] if num_gpus == 8 else [])
    plan = make_plan(recipe, num_gpus, H100)
    assert plan.num_parameters == 14_659_507_200
    assert plan.step_tokens == 23_592_960
    check_fit(plan)


@pytest.mark.parametrize("override", ON_EIGHT["phi4_14b_midtrain_16k"])
def test_recipe_names_its_overrides(override: str) -> None:
    text = (RECIPES / "phi4_14b_midtrain_16k.toml").read_text(encoding="utf-8")
    assert override in text


def test_refusal_names_stage_excess_and_change() -> None:
    recipe = with_overrides(recipe_of("phi4_14b_pretrain"), ["batch.micro_batch_size=4"])
    plan = make_plan(recipe, 8, H100)
    excess = (plan.stages[0].total - H100.capacity_bytes) / 2**30
    with pytest.raises(LayoutError) as refused:
        check_fit(plan)
    message = str(refused.value)
    assert "\n" not in message
    assert message.startswith("stage 0 of 2 needs ")
    assert f"{excess:.1f} GiB more than the 74.5 GiB of H100 SXM 80 GB; these fit: " in message
    assert "recompute.granularity=full" in message


@pytest.mark.parametrize(
    ("name", "overrides", "num_gpus"),
    [
        ("phi4_14b_pretrain", ["batch.micro_batch_size=8"], 8),
        ("phi4_14b_pretrain", [*WHOLE, "batch.micro_batch_size=2"], 8),
        ("phi4_14b_midtrain_16k", ["parallel.context=2"], 8),
    ],
)
def test_every_named_remedy_fits(name: str, overrides: list[str], num_gpus: int) -> None:
    plan = make_plan(with_overrides(recipe_of(name), overrides), num_gpus, H100)
    assert fullest_stage(plan).total > H100.capacity_bytes
    found = remedies(plan)
    assert 0 < len(found) <= MOST_REMEDIES
    for remedy in found:
        changed = with_overrides(plan.recipe, remedy.split())
        check_fit(make_plan(changed, num_gpus, H100))


def test_hopeless_case_asks_for_more_gpus() -> None:
    recipe = with_overrides(
        recipe_of("phi4_14b_pretrain"),
        [
            "parallel.tensor=1",
            "parallel.sequence=false",
            *WHOLE,
        ],
    )
    with pytest.raises(LayoutError, match="use more than 1 GPUs or a larger card"):
        check_fit(make_plan(recipe, 1, H100))


def test_larger_card_takes_what_a_smaller_one_refuses() -> None:
    recipe = with_overrides(recipe_of("phi4_14b_pretrain"), ["batch.micro_batch_size=2"])
    check_fit(make_plan(recipe, 8, CARDS["h200"]))
    with pytest.raises(LayoutError, match="A100 SXM 80 GB"):
        check_fit(make_plan(recipe, 8, CARDS["a100"]))


def test_unknown_card_is_named() -> None:
    with pytest.raises(ConfigError, match="--gpu b200 is not known; use h100, h200, a100"):
        card_named("b200")
