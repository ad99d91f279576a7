"""Every combination of a sweep is a recipe, and what is none is named before anything starts."""

import itertools
import re
from pathlib import Path

import pytest

from phi4.errors import ConfigError
from phi4.launch.sweep import load_sweep, runs_of
from tests.support.sweeps import loaded, write_sweep

SETS = """
[axes.mixture.sets]
both = { weights = { a = 0.5, b = 0.5 } }
only_b = { weights = { b = 1.0 }, optim.warmup = 2 }
"""


def test_a_grid_is_every_combination_with_every_seed(tmp_path: Path) -> None:
    _, runs = loaded(write_sweep(tmp_path))
    made = [(r.recipe.optim.learning_rate, r.recipe.run.steps, r.recipe.run.seed) for r in runs]
    assert made == [
        (rate, steps, seed) for steps, rate, seed in itertools.product((4, 8), (1e-3, 3e-3), (1, 2))
    ]
    assert len({run.recipe.run.dir for run in runs}) == 8
    assert runs[0].name == "learning_rate=0.001.short.seed_1"
    assert runs[0].run_dir == tmp_path / "sweep" / "runs" / runs[0].name
    assert {run.recipe.tracking.sweep for run in runs} == {"small"}
    recipe = runs[-1].recipe
    rows = recipe.batch.global_batch_size * recipe.run.steps
    assert runs[-1].tokens == rows * recipe.data.sequence_length


def test_sets_change_several_keys_and_weigh_the_sources(tmp_path: Path) -> None:
    _, runs = loaded(write_sweep(tmp_path, ("[scales.short]", SETS + "[scales.short]")))
    assert len(runs) == 16
    by_variant = {run.variant: run for run in runs}
    assert list(by_variant)[:2] == ["learning_rate=0.001, both", "learning_rate=0.001, only_b"]
    both, only_b = list(by_variant.values())[:2]
    assert [(s.name, s.weight) for s in both.recipe.data.sources] == [("a", 0.5), ("b", 0.5)]
    assert [(s.name, s.weight, s.path) for s in only_b.recipe.data.sources] == [("b", 1.0, "b")]
    assert (both.recipe.optim.warmup, only_b.recipe.optim.warmup) == (3, 2)
    assert only_b.values == {"learning_rate": 1e-3, "mixture": "only_b"}


def test_values_keep_the_digits_that_tell_them_apart(tmp_path: Path) -> None:
    _, runs = loaded(write_sweep(tmp_path, ("1e-3, 3e-3", "0.00123456, 0.001234561")))
    assert list(dict.fromkeys(run.variant for run in runs)) == [
        "learning_rate=0.00123456",
        "learning_rate=0.001234561",
    ]


def test_zip_takes_axes_side_by_side(tmp_path: Path) -> None:
    zipped = 'combine = "zip"\n[axes.w]\nkey = "optim.warmup"\nvalues = [1, 2]\n[axes.l'
    _, runs = loaded(write_sweep(tmp_path, ("[axes.l", zipped)))
    pairs = {(run.recipe.optim.warmup, run.recipe.optim.learning_rate) for run in runs}
    assert pairs == {(1, 1e-3), (2, 3e-3)}


def test_an_axis_holds_over_the_scale_and_the_scale_over_all(
    tmp_path: Path,
) -> None:
    change = "[overrides]\noptim.learning_rate = 7.0\noptim.warmup = 1\nrun.steps = 9\n"
    scale = "[scales.short]\noptim.learning_rate = 8.0\n"
    _, runs = loaded(write_sweep(tmp_path, ("[scales.short]\n", change + scale)))
    assert {run.recipe.optim.learning_rate for run in runs} == {1e-3, 3e-3}
    assert {run.recipe.run.steps for run in runs} == {4, 8}
    assert {run.recipe.optim.warmup for run in runs} == {1}


WRONG = [
    (("seeds = [1, 2]", "seeds = []"), "seeds"),
    (("seeds = [1, 2]", "seeds = [1, 1]"), "seeds: [1, 1] contains a seed twice"),
    (("seeds =", "seds ="), "unknown key seds; did you mean seeds?"),
    (("optim.learning_rate", "optim.learnin_rate"), "did you mean optim.learning_rate?"),
    (("optim.learning_rate", "run.seed"), "run.seed is set by the sweep"),
    (("values = [1e-3, 3e-3]", ""), "values of optim.learning_rate are missing"),
    (("1e-3, 3e-3", "1e-3, 1e-3"), "runs would share a directory"),
    (("1e-3, 3e-3", "1e-3, -1.0"), "learning_rate=-1.short.seed_1: optim.learning_rate"),
    (("run.steps = 8", "run.steps = 8\nparallel.tensor = 7"), ".long.seed_1: parallel.tensor=7"),
    (("run.steps = 8", "run.dir = 'x'"), "sets run.dir, which the sweep sets itself"),
    (("run.steps = 8", "rum.steps = 8"), "unknown key rum; did you mean"),
    (
        ("run.steps = 8", "weights.c = 1.0"),
        "weights has unknown sources c; the base recipe has a, b",
    ),
    (
        ("seeds", "baseline = 'x'\nseeds"),
        "baseline='x' is not a variant; use one of learning_rate=",
    ),
    (("seeds", "metrics = ['held_out_loss/x']\nseeds"), "data.held_out has held"),
    (("seeds", "maximize = ['loss']\nseeds"), "maximize has loss, which are not in metrics"),
    (("base.toml", "base.tml"), "base.tml does not exist"),
    (
        ("[axes.l", "[axes.x]\nkey = 'optim.learning_rate'\nvalues = [1.0]\n[axes.l"),
        "merge them",
    ),
    (("[axes.l", "combine = 'zip'\n[axes.x]\nkey = 'run.steps'\nvalues = [1]\n[axes.l"), "length"),
    (
        ("[axes.l", "[axes.x.sets]\ny.optim.learning_rate = 1.0\n[axes.l"),
        "both set optim.learning_r",
    ),
    (('name = "small"', "name = 1"), "name"),
    (("[scales.long]", "[scales.'a b']"), "scales"),
]


@pytest.mark.parametrize(("change", "message"), WRONG, ids=[message for _, message in WRONG])
def test_what_is_wrong_is_named(tmp_path: Path, change: tuple[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        loaded(write_sweep(tmp_path, change))


def test_every_wrong_combination_is_counted(tmp_path: Path) -> None:
    path = write_sweep(tmp_path, ("1e-3, 3e-3", "1e-3, -1.0, -2.0"))
    with pytest.raises(ConfigError, match="8 runs do not have a valid recipe") as caught:
        loaded(path)
    assert str(caught.value).count("\n  - ") == 5
    assert str(caught.value).endswith("and 3 more")


def test_what_the_stage_asks_counts(tmp_path: Path) -> None:
    path = write_sweep(tmp_path)

    def asks(recipe: object) -> list[str]:
        return ["the stage refuses"] if recipe.run.steps == 8 else []

    with pytest.raises(ConfigError, match=r"\.long\.seed_1: the stage refuses"):
        runs_of(load_sweep(path), str(path), asks)
