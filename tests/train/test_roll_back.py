"""Runs that are stopped, rolled back and killed, against runs that never were: bit by bit."""

import shutil
from contextlib import ExitStack, chdir
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, NamedTuple
from unittest.mock import patch

import numpy as np
import pytest
from megatron.core import parallel_state
from typer.testing import CliRunner

from phi4.cli.data import app
from phi4.data.stream import loader as loaders
from phi4.data.stream.batch import Batch
from phi4.data.stream.read_ahead import ReadAheadLoader
from phi4.engine.platform import disconnect
from phi4.errors import Phi4Error, PlatformError
from phi4.rundir.manifest import read_manifest
from phi4.rundir.state import RunState, Skip, read_state
from phi4.rundir.step_log import read_metrics
from phi4.stages.pretrain import NextToken
from phi4.track import Trackers
from phi4.train.hooks import CONTINUE, Decision, Hook, Progress, RollBack, SaveAndStop
from phi4.train.session import run_training
from tests.support.byte_source import write_byte_source
from tests.support.engines import platform_of, tiny_recipe
from tests.support.metrics_page import unexplained
from tests.support.ranks import RankPool, pool_fixture

STEPS, ROWS = 6, 8
RECIPE = (
    *("tokenizer.kind=bpe", "tokenizer.path=bpe.tiktoken", "model.vocab_size=352"),
    *("model.num_layers=2", f"run.steps={STEPS}", "checkpoint.every=2", "checkpoint.keep=9"),
    "data.sources=[{name='a', path='tokens'}]",
)
SHARDED = ("parallel.data=2", "parallel.distributed_optimizer=true")
COMPARED = ("step", "loss", "grad_norm", "learning_rate", "consumed_tokens")
BACK = {5: RollBack(2, "spike")}
"""From step 5 to the checkpoint of step 2: steps 3 to 5 are undone."""
UNDONE_ROWS = 3 * ROWS


class Once(Hook):
    """Decides once at each of some steps."""

    def __init__(self, decisions: dict[int, Decision]) -> None:
        self._decisions = dict(decisions)

    def act(self, progress: Progress) -> Decision:
        return self._decisions.pop(progress.step, CONTINUE)


class KilledAfterwards(Hook):
    """Ends the run at the first step after a roll back."""

    _is_due = False

    def rewind(self, state: RunState) -> None:
        self._is_due = True

    def measure(self, progress: Progress) -> dict[str, float]:
        if self._is_due:
            raise PlatformError("killed")
        return {}


class Recorded(ReadAheadLoader):
    """A loader that keeps what it served, and can skip rows where it goes on."""

    served: ClassVar[list[list[Batch]]] = []
    skipped_rows: ClassVar[int] = 0

    def go_to(self, state: dict | None) -> None:
        super().go_to(state)
        if state is not None:
            self.stream.skip(self.skipped_rows)  # a row is one draw

    def next_step(self, **layout: int) -> list[Batch]:
        batches = super().next_step(**layout)
        self.served.append(batches)
        return batches


@dataclass(frozen=True)
class Plan:
    """A start of a run, and what happens to it."""

    run_dir: str
    overrides: tuple[str, ...] = ()
    decisions: dict[int, Decision] = field(default_factory=dict)
    broken: str = ""
    """What raises an OSError on the writer, in the place of a kill."""
    is_killed_afterwards: bool = False
    """Ends at the first step after a roll back."""
    skipped_rows: int = 0
    """Skipped by the loader where the run goes on, whatever the run's own files say."""


@dataclass(frozen=True)
class Outcome:
    """How it ended on one rank."""

    ended: str
    served: list[np.ndarray]
    """Rows of each step, [n, S]."""
    statuses: list[str]
    """What the trackers were told."""
    num_reads: int
    """Source manifests that were read."""
    said: str
    """What the console showed besides steps."""


def start(rank: int, world_size: int, root: Path, plan: Plan) -> Outcome | None:
    """One rank of a run; None on a rank that its layout does not need."""
    recipe = tiny_recipe(*RECIPE, f"run.dir={plan.run_dir}", *plan.overrides)
    platform = platform_of(rank, recipe)
    if platform is None:
        return None
    said: list[str] = []
    killers = [KilledAfterwards()] if plan.is_killed_afterwards else []
    Recorded.served, Recorded.skipped_rows = [], plan.skipped_rows
    with ExitStack() as stack:
        stack.enter_context(chdir(root))
        stack.enter_context(patch("phi4.train.sources.ReadAheadLoader", Recorded))
        finish = stack.enter_context(patch.object(Trackers, "finish"))
        read = patch.object(loaders, "read_source", wraps=loaders.read_source)
        reads = stack.enter_context(read)
        stack.enter_context(patch("phi4.train.session.print_line", said.append))
        if plan.broken:
            stack.enter_context(patch(plan.broken, side_effect=OSError("killed")))
        try:
            ending = run_training(
                recipe,
                platform,
                NextToken(),
                allow_change=False,
                hooks=(lambda _: [Once(plan.decisions)], lambda _: killers),
            )
            ended = f"ended after step {ending.state.step}"
        except Phi4Error as error:
            ended = f"{type(error).__name__}: {error}"
        finally:
            parallel_state.destroy_model_parallel()
            disconnect()
    served = [np.concatenate([b.tokens for b in batches]) for batches in Recorded.served]
    statuses = [one.args[0] for one in finish.mock_calls]
    return Outcome(ended, served, statuses, reads.call_count, "\n".join(said))


pool = pool_fixture(2)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of the bytes and a source."""
    root = tmp_path_factory.mktemp("runs")
    write_byte_source(root, np.random.default_rng(1).integers(256, size=4000))
    return root


def recorded(run: Path) -> list[tuple[float, ...]]:
    """What a run recorded of each step that does not depend on the clock."""
    return [tuple(line[key] for key in COMPARED) for line in read_metrics(run / "metrics.jsonl")]


def tensors(run: Path) -> dict[str, str]:
    """Hashes of the last step's files with weights, optimizer and random states.

    None of format dp, which also holds the padding between parameters: whatever was in memory.
    """
    manifest = read_manifest(run / f"checkpoints/step_{STEPS:07}")
    if manifest.optimizer_format == "dp":
        return {}
    found = {n: f.sha256 for n, f in manifest.files.items() if n.endswith(".distcp")}
    assert found
    return found


@pytest.fixture(scope="module")
def straight(pool: RankPool, root: Path) -> Path:
    """A run that nothing happens to."""
    outcome, _ = pool.run(start, root, Plan("straight"))
    assert (outcome.ended, outcome.statuses) == ("ended after step 6", ["finished"])
    return root / "straight"


@pytest.mark.parametrize("step", [3, 4])
def test_stopped_run_goes_on_as_if_it_never_stopped(
    pool: RankPool, root: Path, straight: Path, step: int
) -> None:
    """At a step that is saved anyway, and at one that is not."""
    name = f"stopped{step}"
    plan = Plan(name, decisions={step: SaveAndStop("the cluster wants it")})
    stopped, _ = pool.run(start, root, plan)
    assert (stopped.ended, stopped.statuses) == (f"ended after step {step}", ["interrupted"])
    assert stopped.said.count(f"saved {name}/checkpoints/step_000000{step}") == 1
    assert f"stopped after step {step} of 6: the cluster wants it" in stopped.said
    resumed, _ = pool.run(start, root, Plan(name))
    assert (resumed.ended, resumed.num_reads) == ("ended after step 6", 1)
    assert recorded(root / name) == recorded(straight)
    assert tensors(root / name) == tensors(straight)


class Expected(NamedTuple):
    """What a run records and ends with that goes from step 2 on behind the window."""

    metrics: list[tuple[float, ...]]
    tensors: dict[str, str]


def without_window(pool: RankPool, root: Path, name: str, layout: tuple[str, ...]) -> Expected:
    """By another way: stopped at step 2, and the loader told to skip the rows as it goes on."""
    pool.run(start, root, Plan(name, layout, {2: SaveAndStop("here")}))
    outcome, *_ = pool.run(start, root, Plan(name, layout, skipped_rows=UNDONE_ROWS))
    assert outcome.ended == "ended after step 6"
    return Expected(recorded(root / name), tensors(root / name))


@pytest.fixture(scope="module")
def expected(pool: RankPool, root: Path) -> Expected:
    return without_window(pool, root, "expected", ())


def check_rolled_back(run: Path, expected: Expected) -> None:
    assert recorded(run) == expected.metrics
    assert tensors(run) == expected.tensors
    lines = read_metrics(run / "metrics.jsonl")
    marked = [line for line in lines if "rolled_back_from" in line or "skipped_rows" in line]
    assert marked == [lines[2]] and unexplained(lines) == []
    assert (lines[2]["rolled_back_from"], lines[2]["skipped_rows"]) == (5, UNDONE_ROWS)
    newest = run / "checkpoints/step_0000006"
    assert read_state(newest).skips == (Skip(2, 5, UNDONE_ROWS, UNDONE_ROWS, "spike"),)
    printed = CliRunner().invoke(app, ["ledger", str(run)], catch_exceptions=False).output
    assert "skipped 24 units (24 rows) after step 2: steps 3 to 5 were rolled back (spike)" in (
        printed
    )


LAYOUTS = {
    "sharded": (*SHARDED, "checkpoint.optimizer_format=dp"),
    "overlapping": (
        *SHARDED,
        "checkpoint.optimizer_format=full",
        "parallel.overlap_grad_reduce=true",
        "parallel.overlap_param_gather=true",
    ),
    "tensor": ("parallel.tensor=2",),
}


@pytest.mark.parametrize(
    "layout", ["sharded", *(pytest.param(n, marks=pytest.mark.slow) for n in list(LAYOUTS)[1:])]
)
def test_rolled_back_run_goes_on_behind_the_window_in_every_layout(
    pool: RankPool, root: Path, layout: str
) -> None:
    expected = without_window(pool, root, f"{layout}_expected", LAYOUTS[layout])
    ranks = pool.run(start, root, Plan(layout, LAYOUTS[layout], BACK))
    assert [rank.ended for rank in ranks] == ["ended after step 6"] * 2
    check_rolled_back(root / layout, expected)


def test_rolled_back_run_is_served_the_stream_without_the_window(
    pool: RankPool, root: Path, straight: Path, expected: Expected
) -> None:
    outcome, _ = pool.run(start, root, Plan("back", decisions=BACK))
    assert (outcome.ended, outcome.statuses) == ("ended after step 6", ["finished"])
    check_rolled_back(root / "back", expected)
    line = "rolled back from step 5 to back/checkpoints/step_0000002: spike; 24 rows are skipped"
    assert line in outcome.said
    served = np.concatenate(outcome.served)
    assert len(served) == 9 * ROWS and len(np.unique(served, axis=0)) == 9 * ROWS
    # The trace finds what each step was served, the skipped window left out.
    in_force = [*outcome.served[:2], *outcome.served[5:]]
    with chdir(root):
        for step, rows in enumerate(in_force, start=1):
            asked = ["trace", "back", "--step", str(step), "--sample", "3", "--show"]
            shown = CliRunner().invoke(app, asked, catch_exceptions=False).output
            text = bytes(rows[3].tolist()).decode(errors="replace")
            assert shown.split("---\n")[1] == f"{text}\n"


KILLS = {
    "before the older checkpoint is the newest": "phi4.rundir.roll_back.remove_newer",
    "before newer checkpoints are gone": "phi4.rundir.checkpoints._remove",
    "before the records are cut": "phi4.track.Trackers.rewind",
    "before the first new save": "",
}
BRIEF = ("before the older checkpoint is the newest", "before the first new save")


@pytest.mark.parametrize(
    "moment",
    [*BRIEF, *(pytest.param(m, marks=pytest.mark.slow) for m in KILLS if m not in BRIEF)],
)
def test_run_killed_in_a_roll_back_goes_on_behind_the_window(
    pool: RankPool, root: Path, expected: Expected, moment: str
) -> None:
    name = moment.replace(" ", "_")
    killed, _ = pool.run(start, root, Plan(name, (), BACK, KILLS[moment], not KILLS[moment]))
    assert killed.ended.startswith("PlatformError") and killed.statuses == ["failed"]
    pool.run(start, root, Plan(name, decisions={3: SaveAndStop("here")}))
    # A save of an undone step would count as newer than those of the steps that are done.
    left = sorted(path.name for path in (root / name / "checkpoints").glob("step_*"))
    assert left == ["step_0000002", "step_0000003"]
    resumed, _ = pool.run(start, root, Plan(name))
    assert resumed.ended == "ended after step 6"
    check_rolled_back(root / name, expected)


@pytest.mark.slow
def test_roll_back_that_cannot_be_written_did_not_happen(
    pool: RankPool, root: Path, straight: Path
) -> None:
    broken = "phi4.rundir.roll_back.write_atomically"
    failed, _ = pool.run(start, root, Plan("unwritten", decisions=BACK, broken=broken))
    assert failed.ended.startswith("PlatformError")
    resumed, _ = pool.run(start, root, Plan("unwritten"))
    assert resumed.ended == "ended after step 6"
    assert recorded(root / "unwritten") == recorded(straight)


@pytest.mark.slow
def test_damaged_checkpoints_are_passed_over_and_the_window_stays_skipped(
    pool: RankPool, root: Path, expected: Expected
) -> None:
    """The roll back falls back by one more checkpoint, and so does the start after it."""
    every = ("checkpoint.every=1",)
    pool.run(start, root, Plan("damaged", every, {5: SaveAndStop("here")}))
    checkpoints = root / "damaged/checkpoints"
    for step in (3, 5):
        (checkpoints / f"step_000000{step}/common.pt").write_bytes(b"")
    plan = Plan("damaged", every, {5: RollBack(2, "spike")}, "phi4.track.Trackers.rewind")
    pool.run(start, root, plan)
    assert not (checkpoints / "step_0000003").exists()
    shutil.rmtree(checkpoints / "step_0000002")
    stopped, _ = pool.run(start, root, Plan("damaged", every, {3: SaveAndStop("here")}))
    assert "skipping 32 rows (spike)" in stopped.said
    resumed, _ = pool.run(start, root, Plan("damaged", every))
    assert "resumed from damaged/checkpoints/step_0000003 (step 3)" in resumed.said
    assert resumed.ended == "ended after step 6"
    (skip,) = read_state(checkpoints / "step_0000006").skips
    assert (skip.after_step, skip.last_undone, skip.rows) == (1, 5, 4 * ROWS)


@pytest.mark.slow
def test_run_that_begins_anew_forgets_the_roll_back_of_the_run_before_it(
    pool: RankPool, root: Path, straight: Path
) -> None:
    pool.run(start, root, Plan("anew", (), BACK, "phi4.track.Trackers.rewind"))
    shutil.rmtree(root / "anew/checkpoints")
    pool.run(start, root, Plan("anew", decisions={4: SaveAndStop("here")}))
    pool.run(start, root, Plan("anew"))
    assert recorded(root / "anew") == recorded(straight)


def test_roll_back_beyond_the_oldest_checkpoint_names_what_there_is(
    pool: RankPool, root: Path
) -> None:
    outcome, _ = pool.run(start, root, Plan("short", decisions={3: RollBack(2, "spike")}))
    assert outcome.ended.startswith("CheckpointError: a rollback of 2 steps from step 3 (spike)")
    assert "needs a checkpoint of step 1 or before" in outcome.ended
    assert "holds step_0000002; lower checkpoint.every" in outcome.ended
