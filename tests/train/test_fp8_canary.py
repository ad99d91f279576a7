"""Runs in FP8 with the canary: a harmed layer leaves, for good, and the record says so."""

from pathlib import Path

import pytest

from phi4.engine.engine import Engine
from phi4.rundir.checkpoints import checkpoints_dir, latest_checkpoint
from phi4.rundir.state import FP8Fallback, read_state
from phi4.rundir.step_log import read_metrics
from phi4.track.mlflow.description import describe
from phi4.track.report.reported_run import read_reported
from phi4.track.report.trouble import trouble_table
from tests.support.fp8_plants import plant_outlier
from tests.support.guarded_runs import (
    Ended,
    Poison,
    RunPlan,
    recorded,
    start,
    weights,
    write_source,
)
from tests.support.metrics_page import unexplained
from tests.support.ranks import RankPool, pool_fixture

RECIPE = (
    *("model.num_layers=4", "precision.fp8=torch", "precision.fp8_check_every=3"),
    *("reliability.spike_deviations=0", "run.steps=9"),
)
PIPELINE = "parallel.pipeline=2"
LAYER = 2


pool = pool_fixture(2)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("canary")
    write_source(path)
    return path


def plant(engine: Engine) -> None:
    plant_outlier(engine, LAYER)


def run(pool: RankPool, root: Path, run_dir: str, *overrides: str, **plan) -> Ended:
    """Of rank 0."""
    plan = {"at_step": (2, plant)} | plan
    return pool.run(start, root, RunPlan(run_dir, (*RECIPE, *overrides), **plan))[0]


@pytest.fixture(scope="module")
def harmed(pool: RankPool, root: Path) -> tuple[Path, Ended]:
    """A run over two stages, harmed after step 2."""
    return root / "harmed", run(pool, root, "harmed", PIPELINE)


def fallbacks_of(run_dir: Path) -> tuple[FP8Fallback, ...]:
    return read_state(latest_checkpoint(checkpoints_dir(run_dir))).fp8_fallbacks


def test_the_harmed_layer_leaves_and_record_and_checkpoint_say_so(
    harmed: tuple[Path, Ended],
) -> None:
    run_dir, ended = harmed
    [fallback] = fallbacks_of(run_dir)
    assert (fallback.step, fallback.layer) == (3, LAYER)
    assert fallback.reason.startswith("underflow of weight")
    assert (
        f"step 3: layer {LAYER} leaves FP8 and continues in fp32: {fallback.reason}" in ended.said
    )
    lines = read_metrics(run_dir / "metrics.jsonl")
    found = {line["step"]: line for line in lines if "fp8/loss_gap" in line}
    assert list(found) == [3, 6, 9]
    left = [line["step"] for line in lines if any(key.startswith("fp8/fallback/") for key in line)]
    assert left == [3]
    assert found[3][f"fp8/fallback/{LAYER}"] == 1
    assert all(line["fp8/fallback_layers"] == 1 for line in found.values())
    assert found[3]["fp8/gradient_cosine"] < 0.9 < found[6]["fp8/gradient_cosine"]
    # What has left casts nothing.
    assert f"fp8/underflow/weight/{LAYER}" in found[3]
    assert f"fp8/underflow/weight/{LAYER}" not in found[6]
    assert unexplained(lines) == []


def test_tracker_and_report_name_the_layer_and_its_step(harmed: tuple[Path, Ended]) -> None:
    run_dir, _ = harmed
    assert describe(run_dir).tags["phi4.fp8.fallbacks"] == f"layer {LAYER} after step 3"
    [run] = read_reported([run_dir])
    [(step, reason, done)] = trouble_table(run).rows
    assert (step, done) == ("3", f"layer {LAYER} stops using FP8")
    assert reason.startswith("underflow of weight")


@pytest.mark.slow
@pytest.mark.parametrize("layout", [(), ("parallel.data=2", "parallel.distributed_optimizer=true")])
def test_healthy_run_loses_no_layer(pool: RankPool, root: Path, layout: tuple[str, ...]) -> None:
    run_dir = root / f"healthy{len(layout)}"
    run(pool, root, run_dir.name, *layout, at_step=None)
    assert fallbacks_of(run_dir) == ()
    lines = read_metrics(run_dir / "metrics.jsonl")
    assert [line["fp8/fallback_layers"] for line in lines if "fp8/loss_gap" in line] == [0] * 3
    # Nor does the comparison change what is trained.
    without = root / f"unchecked{len(layout)}"
    run(pool, root, without.name, *layout, "precision.fp8_check_every=0", at_step=None)
    assert recorded(run_dir) == recorded(without)
    assert weights(run_dir, 9) == weights(without, 9)


@pytest.mark.parametrize("every", [pytest.param(3, marks=pytest.mark.slow), 0])
def test_resumed_run_keeps_the_layer_out(
    pool: RankPool, root: Path, harmed: tuple[Path, Ended], every: int
) -> None:
    run_dir = root / f"resumed{every}"
    run(pool, root, run_dir.name, PIPELINE, stop_after=5)
    ended = run(
        pool, root, run_dir.name, PIPELINE, f"precision.fp8_check_every={every}", at_step=None
    )
    assert f"layers {LAYER} left FP8 and stay in fp32" in ended.said
    assert fallbacks_of(run_dir) == fallbacks_of(harmed[0])
    assert recorded(run_dir) == recorded(harmed[0])
    assert weights(run_dir, 9) == weights(harmed[0], 9)


@pytest.mark.slow
def test_layer_stays_out_in_another_layout(
    pool: RankPool, root: Path, harmed: tuple[Path, Ended]
) -> None:
    run(pool, root, "moved", PIPELINE, stop_after=5)
    tensor = ("parallel.tensor=2", "parallel.sequence=true")
    ended = run(pool, root, "moved", *tensor, at_step=None)
    assert f"layers {LAYER} left FP8 and stay in fp32" in ended.said
    assert fallbacks_of(root / "moved") == fallbacks_of(harmed[0])
    losses = [[line[1] for line in recorded(run_dir)] for run_dir in (root / "moved", harmed[0])]
    assert losses[0] == pytest.approx(losses[1], rel=2e-3)


@pytest.mark.slow
def test_rolled_back_run_keeps_the_layer_out(pool: RankPool, root: Path) -> None:
    run_dir, bad = root / "rolled_back", Poison((range(6, 8),))
    keys = ("precision.fp8_check_every=5", "run.steps=12")
    ended = run(pool, root, run_dir.name, *keys, poison=bad)
    # The checkpoint of step 4 does not know what was found at step 5.
    assert "rolled back from step 7" in ended.said and "step_0000004" in ended.said
    [fallback] = fallbacks_of(run_dir)
    assert (fallback.step, fallback.layer) == (5, LAYER)
    found = [line for line in read_metrics(run_dir / "metrics.jsonl") if "fp8/loss_gap" in line]
    assert [line["step"] for line in found] == [5, 10]
    assert f"fp8/underflow/weight/{LAYER}" not in found[0]
