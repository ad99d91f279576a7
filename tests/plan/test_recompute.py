"""A recompute that saves nothing is called a mistake, and the recipes make none."""

from pathlib import Path

import pytest

from phi4.config import load_recipe, with_overrides
from phi4.plan import CARDS, make_plan, recompute_mistake

RECIPES = Path(__file__).parents[2] / "examples" / "recipes"


def mistake(name: str, *overrides: str) -> str | None:
    recipe = with_overrides(load_recipe(RECIPES / f"{name}.toml"), overrides)
    replicas = recipe.batch.global_batch_size // recipe.batch.micro_batch_size
    num_gpus = min(16, replicas * recipe.parallel.model_parallel_size)
    return recompute_mistake(make_plan(recipe, num_gpus, CARDS["h100"]))


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.toml")), ids=lambda path: path.stem)
def test_no_recipe_recomputes_for_nothing(path: Path) -> None:
    assert mistake(path.stem) is None


def test_selective_recompute_beside_fused_attention_is_a_mistake() -> None:
    assert mistake("phi4_14b_pretrain", "recompute.granularity=selective") == (
        "recompute.granularity=selective computes core attention twice and takes 0.08 GiB more: "
        "stage 0 needs 56.99 GiB with it, 56.90 GiB without; use recompute.granularity=none"
    )


def test_recompute_that_saves_is_none() -> None:
    assert mistake("phi4_14b_pretrain", "recompute.granularity=full") is None
    # Unfused attention in fp32 keeps its probabilities.
    fp32 = "precision.dtype=fp32"
    assert mistake("phi4_14b_pretrain", fp32, "recompute.granularity=selective") is None
