"""Bad numbers in real runs: skipped, replayed, rolled back, and named."""

from contextlib import AbstractContextManager
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from phi4.engine.engine import Engine
from phi4.engine.model.gpt import global_parameters
from phi4.errors import CorruptionError
from phi4.rundir.bad_checkpoints import note_bad
from phi4.rundir.state import Skip, read_state
from phi4.rundir.step_log import read_metrics
from tests.support.guarded_runs import ROWS, Ended, Poison, RunPlan, recorded, start, weights
from tests.support.guarded_runs import write_source as write
from tests.support.ranks import RankPool, pool_fixture

DATA = ("parallel.data=2",)
SHARDED = (*DATA, "parallel.distributed_optimizer=true", "checkpoint.optimizer_format=full")
OVERLAPPING = (
    *SHARDED,
    "parallel.overlap_grad_reduce=true",
    "parallel.overlap_param_gather=true",
)
PIPELINE, TENSOR = ("parallel.pipeline=2",), ("parallel.tensor=2",)
CONTEXT = ("parallel.context=2",)
WINDOW = (range(6, 8),)
"""Steps 6 and 7 are bad: the run goes back from step 7 to step 4, over the data of 5 to 7."""
LAST = 12


pool = pool_fixture(2)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    write(root)
    return root


def run(pool: RankPool, root: Path, plan: RunPlan) -> Ended:
    """All ranks of the layout; they must end alike."""
    ranks = [one for one in pool.run(start, root, plan) if one is not None]
    assert len({(one.how, one.exit_code) for one in ranks}) == 1, ranks
    return ranks[0]


def spared(pool: RankPool, root: Path, layout: tuple[str, ...], name: str) -> Path:
    """A run whose recipe leaves the window's data out from the start."""
    plan = RunPlan(name, (*layout, f"data.skip_windows=[[4, {3 * ROWS}]]"))
    assert run(pool, root, plan).how == f"ended after step {LAST}"
    return root / name


def check_equal(run_dir: Path, other: Path) -> None:
    assert recorded(run_dir) == recorded(other)
    assert weights(run_dir, LAST) == weights(other, LAST)
    ends = [read_state(one / f"checkpoints/step_{LAST:07}") for one in (run_dir, other)]
    assert ends[0].numerics == ends[1].numerics and ends[0].data == ends[1].data


@pytest.fixture(scope="module")
def single(pool: RankPool, root: Path) -> Path:
    return spared(pool, root, (), "single")


@pytest.mark.parametrize("kind", ["nan", pytest.param("spike", marks=pytest.mark.slow)])
def test_bad_window_is_rolled_back_and_skipped(
    pool: RankPool, root: Path, single: Path, kind: str
) -> None:
    ended = run(pool, root, RunPlan(kind, poison=Poison(WINDOW, kind)))
    assert (ended.how, ended.statuses) == (f"ended after step {LAST}", ["finished"])
    check_equal(root / kind, single)
    state = read_state(root / kind / f"checkpoints/step_{LAST:07}")
    (skip,) = state.skips
    assert (skip.after_step, skip.last_undone, skip.rows) == (4, 7, 3 * ROWS)
    assert skip.reason.startswith("2 bad steps in a row, the last one: ")
    assert (state.roll_backs, state.numerics.bad_in_row) == (1, 0)
    lines = read_metrics(root / kind / "metrics.jsonl")
    assert (lines[4]["rolled_back_from"], lines[4]["skipped_rows"]) == (7, 24)
    for part in ("step 6: ", "(1 in a row, 1 allowed)", "step 7: ", "gives the same, so the data"):
        assert part in ended.said
    wrong = "loss is nan" if kind == "nan" else "is a spike (above "
    assert wrong in ended.said and wrong in skip.reason
    # The recipe's own window is recorded as what it is.
    (asked,) = read_state(single / f"checkpoints/step_{LAST:07}").skips
    assert asked == Skip(4, 4, 24, 24, "data.skip_windows")


@pytest.mark.slow
@pytest.mark.parametrize("stop_after", [6, 8])
def test_run_stopped_around_a_roll_back_decides_as_if_it_never_stopped(
    pool: RankPool, root: Path, single: Path, stop_after: int
) -> None:
    name, poison = f"stopped{stop_after}", Poison(WINDOW, "spike")
    stopped = run(pool, root, RunPlan(name, poison=poison, stop_after=stop_after))
    assert stopped.how == f"ended after step {stop_after}"
    state = read_state(root / name / f"checkpoints/step_{stop_after:07}")
    assert (state.numerics.bad_in_row, state.roll_backs) == {6: (1, 0), 8: (0, 1)}[stop_after]
    assert run(pool, root, RunPlan(name, poison=poison)).how == f"ended after step {LAST}"
    check_equal(root / name, single)


@pytest.mark.slow
def test_window_of_the_recipe_is_skipped_once_whenever_the_run_stops(
    pool: RankPool, root: Path, single: Path
) -> None:
    window = (f"data.skip_windows=[[4, {3 * ROWS}]]",)
    for stop_after in (4, 5, 0):
        run(pool, root, RunPlan("pieces", window, stop_after=stop_after))
    check_equal(root / "pieces", single)


ONE_RANK = {
    "data": (DATA, Poison(WINDOW, "nan", dp_rank=1), "it arose in the loss of rank 1 on "),
    "loss": (DATA, Poison(WINDOW, "nan_loss", dp_rank=1), "it arose in the loss of rank 1 on "),
    "sharded": (SHARDED, Poison(WINDOW, "nan_loss", dp_rank=0), "arose in the loss of rank 0 on "),
    "overlap": (OVERLAPPING, Poison(WINDOW, "nan", dp_rank=1), "arose in the loss of rank 1 on "),
    "pipeline": (PIPELINE, Poison(WINDOW, "nan_loss"), "it arose in the loss of rank 1 on "),
    "context": (CONTEXT, Poison(WINDOW, "nan"), "it arose in the loss of rank 0 on "),
    "tensor": (TENSOR, Poison(WINDOW, "nan"), "it arose in the loss of rank 0 on "),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", ONE_RANK)
def test_what_is_not_finite_on_one_rank_is_skipped_on_all_in_the_same_step(
    pool: RankPool, root: Path, case: str
) -> None:
    layout, poison, arose = ONE_RANK[case]
    ended = run(pool, root, RunPlan(case, layout, poison))
    assert ended.how == f"ended after step {LAST}"
    assert arose in ended.said
    other = spared(pool, root, layout, f"{case}_spared")
    assert recorded(root / case) == recorded(other)
    if "sharded" not in case and "overlap" not in case:
        assert weights(root / case, LAST) == weights(other, LAST)


class FlippedBit:
    """Flips the lowest bit of the first element of a parameter on one rank."""

    def __init__(self, rank: int, name: str) -> None:
        self.rank, self.name = rank, name

    def __call__(self, engine: Engine) -> None:
        if engine.platform.rank == self.rank:
            weight = dict(global_parameters(engine.bare_chunks))[self.name]
            weight.detach().view(torch.int32).view(-1)[0] ^= 1


@pytest.mark.slow
@pytest.mark.parametrize("layout", [DATA, TENSOR])
def test_flipped_bit_in_one_replica_is_found_within_the_period_and_named(
    pool: RankPool, root: Path, layout: tuple[str, ...]
) -> None:
    name = f"flipped_{layout[0]}"
    names = pool.run(parameter_names)[0]
    norm = next(one for one in names if "1." in one and "norm" in one)
    every = (*layout, "reliability.replica_check_every=3")
    ended = run(pool, root, RunPlan(name, every, at_step=(4, FlippedBit(1, norm))))
    assert ended.exit_code == CorruptionError.exit_code == 8
    assert ended.how.startswith("CorruptionError: one of rank 0 on ")
    assert "rank 1 on " in ended.how and " holds other bits of " in ended.how
    assert ended.statuses == ["failed"]
    assert len(read_metrics(root / name / "metrics.jsonl")) == 6
    # Nothing is wrong with a run that nothing happens to.
    assert run(pool, root, RunPlan(f"{name}_not", every)).how == f"ended after step {LAST}"


def parameter_names(rank: int, world_size: int) -> list[str] | None:
    from tests.support.engines import engine_on, tiny_recipe

    with engine_on(rank, tiny_recipe("model.num_layers=2", "model.vocab_size=352")) as engine:
        return engine and [name for name, _ in global_parameters(engine.bare_chunks)]


class WrongOnce:
    """One rank computes with other weights, from one of its passes on."""

    def __init__(self, guilty: int, at_pass: int) -> None:
        self.guilty, self.at_pass = guilty, at_pass

    def __call__(self, rank: int) -> AbstractContextManager:
        calls, right = [0], Engine.to_device

        def to_device(engine: Engine, batches):
            calls[0] += 1
            if rank == self.guilty and calls[0] == self.at_pass:
                weight = next(engine.bare_chunks[0].parameters())
                weight.detach().view(-1)[:64] *= 1.5
            return right(engine, batches)

        return patch.object(Engine, "to_device", to_device)


def test_a_second_result_that_differs_names_the_rank_that_computes_wrongly(
    pool: RankPool, root: Path
) -> None:
    """Pass 7 of the run is the replay of step 6."""
    plan = RunPlan("hardware", DATA, Poison(WINDOW, "spike"), fault=WrongOnce(1, 7))
    ended = run(pool, root, plan)
    assert ended.exit_code == 8 and ended.statuses == ["failed"]
    assert ended.how.startswith("CorruptionError: step 6 computed twice on the same data gave two")
    assert (
        "results: rank 1 on " in ended.how and " computes wrongly; take the host out" in ended.how
    )
    assert "rank 0 on" not in ended.how


@pytest.mark.slow
def test_bad_steps_that_do_not_end_end_the_run_as_diverged(pool: RankPool, root: Path) -> None:
    limit = ("reliability.max_roll_backs=1",)
    ended = run(pool, root, RunPlan("endless", limit, Poison((range(6, 99),), "nan")))
    assert (ended.exit_code, ended.statuses) == (6, ["failed"])
    assert ended.how.startswith("DivergedError: step 6: 2 bad steps in a row, the last one: loss")
    assert "rolled back 1 times already (reliability.max_roll_backs=1)" in ended.how
    left = sorted(path.name for path in (root / "endless/checkpoints").glob("step_*"))
    assert left == ["step_0000002", "step_0000004"]


def test_without_a_checkpoint_old_enough_the_run_has_diverged(pool: RankPool, root: Path) -> None:
    ended = run(pool, root, RunPlan("early", poison=Poison((range(2, 99),), "nan")))
    assert (ended.exit_code, ended.statuses) == (6, ["failed"])
    assert "needs a checkpoint of step 1 or before" in ended.how


class Spoiled:
    """A weight that no row of the run uses becomes NaN."""

    def __call__(self, engine: Engine) -> None:
        named = dict(global_parameters(engine.bare_chunks))
        embedding = next(weight for name, weight in named.items() if "embed" in name)
        embedding.detach()[-1] = torch.nan


@pytest.mark.slow
def test_weights_that_are_not_finite_are_not_saved(pool: RankPool, root: Path) -> None:
    ended = run(pool, root, RunPlan("spoiled", at_step=(7, Spoiled())))
    assert ended.how == f"ended after step {LAST}"
    assert "weights are not finite, so the step is not saved: " in ended.said
    state = read_state(root / f"spoiled/checkpoints/step_{LAST:07}")
    assert [(skip.after_step, skip.last_undone) for skip in state.skips] == [(6, 8)]


@pytest.mark.slow
def test_checkpoint_that_turns_nan_twice_is_passed_over(pool: RankPool, root: Path) -> None:
    """Once in each of two attempts; every step of the data behind checkpoint 4 is NaN."""
    run(pool, root, RunPlan("bad", stop_after=4))
    poison = Poison((range(5, 6),), "nan")
    once = run(pool, root, RunPlan("bad", poison=poison, stop_after=5))
    assert "step_0000004: training from it was not finite at step 5; the next time" in once.said
    (root / "bad/checkpoints/latest").unlink()
    for path in (root / "bad/checkpoints/step_0000005").iterdir():
        path.unlink()
    twice = run(pool, root, RunPlan("bad", poison=poison))
    assert "rolled back from step 5 to bad/checkpoints/step_0000002: step_0000004 is bad: " in (
        twice.said
    )
    assert twice.how == f"ended after step {LAST}"


@pytest.mark.slow
def test_start_passes_over_bad_checkpoints_until_the_schedule_changes(
    pool: RankPool, root: Path
) -> None:
    run(pool, root, RunPlan("passed", stop_after=4))
    checkpoints = root / "passed/checkpoints"
    for step in (4, 4):
        note_bad(checkpoints, step, 5)
    over = run(pool, root, RunPlan("passed", stop_after=3))
    assert "resumed from passed/checkpoints/step_0000002 (step 2)" in over.said
    for step in (2, 2, 3, 3):
        note_bad(checkpoints, step, 5)
    refused = run(pool, root, RunPlan("passed"))
    assert refused.exit_code == 6
    assert "are bad: training from them became NaN 2 times: step_0000003, " in refused.how
    changed = ("optim.learning_rate=1e-3",)
    again = run(pool, root, RunPlan("passed", changed, stop_after=5, allow_change=True))
    assert "resumed from passed/checkpoints/step_0000003 (step 3)" in again.said


@pytest.mark.slow
def test_only_checkpoint_is_not_pushed_out_while_steps_are_bad(pool: RankPool, root: Path) -> None:
    one = ("checkpoint.every=1", "checkpoint.keep=1")
    ended = run(pool, root, RunPlan("only", one, Poison(WINDOW, "nan")))
    assert ended.how == f"ended after step {LAST}"
    assert "rolled back from step 7 to only/checkpoints/step_0000005: " in ended.said
