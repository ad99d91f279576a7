"""Every sweep that comes with phi4 loads, and so does the recipe of each of its combinations."""

from pathlib import Path

import pytest

from phi4.config import Recipe, load_recipe
from phi4.launch.sweep import load_sweep, runs_of
from phi4.stages import stage_of

EXAMPLES = Path("examples/sweeps")
ROOT = Path(__file__).parents[2]
SWEEPS = sorted((ROOT / EXAMPLES).glob("*.toml"))
NUM_RUNS = {
    "learning_rate": 54,
    "long_context": 9,
    "mixtures": 36,
    "synthetic_epochs": 12,
    "warmup_stress": 18,
}


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_every_combination_is_a_recipe_on_the_demos_data(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)

    def stage_rules(recipe: Recipe) -> list[str]:
        return list(stage_of(recipe).violations(recipe))

    runs = runs_of(load_sweep(path), path.name, stage_rules)
    assert len(runs) == NUM_RUNS[path.stem]
    # What one command of a newcomer makes, and this one.
    made = {f"runs/demo/data/{source}" for source in ("synthetic", "code", "web", "acquired")}
    made |= {f"{name}_held_out" for name in made} | {"runs/demo/data/garbage"}
    read = {s.path for run in runs for s in (*run.recipe.data.sources, *run.recipe.data.held_out)}
    assert read <= made
    assert {run.recipe.tokenizer.path for run in runs} == {"runs/demo/data/bpe.tiktoken"}


def test_the_report_is_the_baseline_of_the_mixtures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    sweep = load_sweep(EXAMPLES / "mixtures.toml")
    [run, *_] = runs_of(sweep, "mixtures.toml")
    assert run.variant == sweep.baseline == "report"
    shares = {source.name: source.weight for source in run.recipe.data.sources}
    base = load_recipe("examples/recipes/tiny_sweep.toml").data.sources
    assert shares == {source.name: source.weight for source in base}
