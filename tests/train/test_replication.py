"""Runs whose checkpoints are lost or damaged, and that find them again on their hosts' own disks.

Each rank is a host of its own: it works in a directory of its own, and `disk` is relative to it.
"""

import logging
import shutil
from collections.abc import Callable
from contextlib import ExitStack, chdir
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from unittest.mock import Mock, patch

import numpy as np
import pytest
import torch
from megatron.core import parallel_state

from phi4.engine.platform import Platform, disconnect
from phi4.errors import Phi4Error, PlatformError
from phi4.rundir import replica
from phi4.rundir.bad_checkpoints import note_bad
from phi4.rundir.manifest import read_manifest
from phi4.rundir.replica import held_replicas
from phi4.rundir.save_log import read_saves
from phi4.rundir.state import RunState
from phi4.rundir.step_log import read_metrics
from phi4.stages.pretrain import NextToken
from phi4.train.hooks import CONTINUE, Decision, Hook, Progress, RollBack
from phi4.train.replication import Replication
from phi4.train.session import run_training
from phi4.writer import Replicate, Replicated, WriterProcess
from tests.support.byte_source import write_byte_source
from tests.support.engines import platform_of, tiny_recipe
from tests.support.forked_writer import forked_writer
from tests.support.ranks import RankPool, pool_fixture
from tests.support.waiting import wait_until

RECIPE = (
    *("tokenizer.kind=bpe", "model.vocab_size=352", "model.num_layers=2", "checkpoint.every=2"),
    *("checkpoint.keep=9", "parallel.distributed_optimizer=true", "checkpoint.replica_dir=disk"),
)
DP2, TP2, ONE = ("parallel.data=2",), ("parallel.tensor=2",), ()
HOSTS = ("alpha", "beta")
COMPARED = ("step", "loss", "grad_norm", "learning_rate", "consumed_tokens")


class GoesBack(Hook):
    """Rolls back once, when its host's copy of step 4 is there, and ends the run after that."""

    _is_due = False

    def act(self, progress: Progress) -> Decision:
        if self._is_due:
            raise PlatformError("killed")
        if progress.step < 5:
            return CONTINUE
        (place,) = Path("disk").iterdir()
        wait_until(lambda: 4 in {held.of.step for held in held_replicas(place)}, "the replica")
        return RollBack(2, "spike")

    def rewind(self, state: RunState) -> None:
        self._is_due = True


@dataclass(frozen=True)
class Plan:
    """A start of the run: to a step, in a layout, with a fault in the copies of beta."""

    steps: int
    layout: tuple[str, ...] = DP2
    overrides: tuple[str, ...] = ()
    spoil: Callable[[], None] | None = None
    goes_back: bool = False


@dataclass(frozen=True)
class Outcome:
    """How it ended on one rank, what the console showed, and what the rank warned of."""

    ended: str
    said: str
    warned: list[str] = field(default_factory=list)


class _Kept(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def start(rank: int, world_size: int, root: Path, plan: Plan) -> Outcome | None:
    """One rank of a run; None on a rank that its layout does not need."""
    recipe = tiny_recipe(
        *RECIPE,
        f"run.dir={root / 'shared/run'}",
        f"tokenizer.path={root / 'bpe.tiktoken'}",
        f"data.sources=[{{name='a', path='{root / 'tokens'}'}}]",
        f"run.steps={plan.steps}",
        *plan.layout,
        *plan.overrides,
    )
    platform = platform_of(rank, recipe)
    if platform is None:
        return None
    said: list[str] = []
    spoil = plan.spoil if rank == 1 and plan.spoil else lambda: None
    kept = _Kept()
    logging.getLogger("phi4.train.replication").addHandler(kept)
    with ExitStack() as stack:
        stack.enter_context(chdir(root / HOSTS[rank]))
        stack.enter_context(patch("socket.gethostname", lambda: HOSTS[rank]))
        stack.enter_context(patch("phi4.train.session.print_line", said.append))
        copier: Callable[..., WriterProcess] = partial(forked_writer, spoil=spoil)
        stack.enter_context(patch("phi4.train.checkpointing.WriterProcess", copier))
        try:
            ending = run_training(
                recipe,
                platform,
                NextToken(),
                allow_change=True,
                hooks=(lambda _: [GoesBack()] if plan.goes_back else [],),
            )
            ended = f"{ending.status} after step {ending.state.step}"
        except Phi4Error as error:
            ended = f"{type(error).__name__}: {error}"
        finally:
            parallel_state.destroy_model_parallel()
            disconnect()
            logging.getLogger("phi4.train.replication").removeHandler(kept)
    return Outcome(ended, "\n".join(said), kept.lines)


pool = pool_fixture(2)


@pytest.fixture(scope="module")
def saved(pool: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps on two hosts that hold copies of it; all that is kept of both."""
    root = tmp_path_factory.mktemp("replication")
    write_byte_source(root, np.random.default_rng(1).integers(256, size=4000))
    for host in HOSTS:
        (root / host / "disk").mkdir(parents=True)
    outcome, other = pool.run(start, root, Plan(4, overrides=("checkpoint.asynchronous=true",)))
    assert outcome.ended == "finished after step 4" and not outcome.warned and not other.warned
    for name in ("shared", *HOSTS):
        shutil.copytree(root / name, root / "kept" / name)
    return root


@pytest.fixture
def root(saved: Path) -> Path:
    """The same at the same place, to be damaged."""
    _put_back(saved)
    return saved


def _put_back(root: Path) -> None:
    for name in ("shared", *HOSTS):
        shutil.rmtree(root / name, ignore_errors=True)
        shutil.copytree(root / "kept" / name, root / name)


def _disk(root: Path, host: str) -> Path:
    (place,) = (root / host / "disk").iterdir()
    return place


def _checkpoint(root: Path, step: int) -> Path:
    return root / f"shared/run/checkpoints/step_{step:07d}"


def _end(root: Path) -> tuple[list[tuple[float, ...]], dict[str, str]]:
    """What was recorded of steps 5 and 6, and the hashes of the last step's shards."""
    lines = read_metrics(root / "shared/run/metrics.jsonl")[-2:]
    files = read_manifest(_checkpoint(root, 6)).files
    shards = {name: entry.sha256 for name, entry in files.items() if name.endswith(".distcp")}
    return [tuple(line[key] for key in COMPARED) for line in lines], shards


def test_hosts_hold_what_they_wrote_and_no_more_than_two_generations(
    pool: RankPool, root: Path
) -> None:
    outcome, _ = pool.run(start, root, Plan(8))
    assert outcome.ended == "finished after step 8"
    for rank, host in enumerate(HOSTS):
        held = held_replicas(_disk(root, host))
        assert [one.of.step for one in held] == [6, 8]
        names = set(read_manifest(_checkpoint(root, 8)).files)
        others = {name for name in names if name.startswith(f"__{1 - rank}_")}
        assert others and set(held[-1].present) == names - others
    states = [e.state for e in read_saves(root / "shared/run") if "replicated" in e.state]
    assert states == ["replicated"] * 4


def _lose_checkpoint(root: Path) -> None:
    shutil.rmtree(_checkpoint(root, 4))


def _lose_all(root: Path) -> None:
    shutil.rmtree(root / "shared/run/checkpoints")


def _lose_all_of_one_host(root: Path) -> None:
    """Both ranks wrote on alpha."""
    _lose_all(root)
    shutil.copytree(root / "beta/disk", root / "alpha/disk", dirs_exist_ok=True)


def _flip_bit(root: Path) -> None:
    path = _checkpoint(root, 4) / "__1_0.distcp"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _lose_manifest(root: Path) -> None:
    (_checkpoint(root, 4) / "manifest.json").unlink()


DAMAGES = {
    "checkpoint": (_lose_checkpoint, 9, TP2),
    "all": (_lose_all, 9, TP2),
    "all, one host": (_lose_all_of_one_host, 9, ONE),
    "bit": (_flip_bit, 1, TP2),
    "manifest": (_lose_manifest, 0, ONE),
}


@pytest.fixture(scope="module")
def undamaged(pool: RankPool, saved: Path) -> dict[tuple[str, ...], object]:
    """How the run goes on from its own checkpoint, by layout."""
    ends = {}
    for layout in (TP2, ONE):
        _put_back(saved)
        outcome = pool.run(start, saved, Plan(6, layout))[0]
        assert outcome.ended == "finished after step 6" and "restored" not in outcome.said
        ends[layout] = _end(saved)
    return ends


@pytest.mark.parametrize(
    "damage",
    [
        *("bit", "all, one host"),
        *(pytest.param(one, marks=pytest.mark.slow) for one in ("checkpoint", "all", "manifest")),
    ],
)
def test_lost_checkpoint_comes_back_and_loads_in_another_layout(
    damage: str, pool: RankPool, undamaged: dict, root: Path
) -> None:
    lose, num_lost, layout = DAMAGES[damage]
    lose(root)
    outcome = pool.run(start, root, Plan(6, layout))[0]
    assert outcome.ended == "finished after step 6", outcome.said
    host = "alpha" if layout == ONE else "alpha, beta"
    line = f"step 4 is restored from replicas on {host}: {num_lost} of its 9 files were missing"
    assert line in outcome.said
    assert "step_0000004 (step 4)" in outcome.said
    assert _end(root) == undamaged[layout]


def test_host_that_is_gone_is_said_and_the_older_checkpoint_taken(
    pool: RankPool, root: Path
) -> None:
    shutil.rmtree(_disk(root, "beta"))
    _flip_bit(root)
    outcome, _ = pool.run(start, root, Plan(6))
    assert outcome.ended == "finished after step 6"
    (line,) = [line for line in outcome.said.splitlines() if "cannot be restored" in line]
    assert line.startswith("step 4 cannot be restored from its replicas: __1_0.distc")
    assert "resumed from" in outcome.said and "step_0000002 (step 2)" in outcome.said
    assert not list((root / "shared/run/checkpoints").glob(".step_*"))


@pytest.mark.slow
def test_replica_that_is_damaged_is_never_put_in_place(pool: RankPool, root: Path) -> None:
    _lose_checkpoint(root)
    shard = next(_disk(root, "beta").glob("step_0000004-*/__1_0.distcp"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    outcome, _ = pool.run(start, root, Plan(6))
    assert outcome.ended == "finished after step 6"
    assert "__1_0.distcp has another size or sha256 than its manifest lists" in outcome.said
    assert "step_0000002 (step 2)" in outcome.said


def _disk_is_full() -> None:
    def refuse(descriptor: int, block: bytes) -> int:
        raise OSError(28, "No space left on device")

    replica.os.write = refuse


@pytest.mark.parametrize("fault", ["full", "missing"])
def test_copy_that_fails_is_a_warning_and_costs_neither_save_nor_run(
    fault: str, pool: RankPool, root: Path
) -> None:
    if fault == "missing":
        shutil.rmtree(root / "beta/disk")
    spoil = _disk_is_full if fault == "full" else None
    outcome, other = pool.run(start, root, Plan(8, spoil=spoil))
    assert outcome.ended == other.ended == "finished after step 8" and not outcome.warned
    cause = {"full": "No space left on device: 'disk/run-", "missing": "No such file or directory"}
    assert [line.split(" ")[1] for line in other.warned] == ["6", "8"]
    for line in other.warned:
        assert "rank 1 on beta: " in line and cause[fault] in line and "'disk/run-" in line
    events = [(e.step, e.state) for e in read_saves(root / "shared/run") if e.step > 4]
    assert events == [(s, t) for s in (6, 8) for t in ("durable", "not_replicated")]
    # What all hosts held before is still there, and nothing that one of them lacks.
    steps = {"full": {4, 8}, "missing": {8}}
    assert steps[fault] == {held.of.step for held in held_replicas(_disk(root, "alpha"))}


def test_steps_that_were_rolled_back_do_not_come_back(pool: RankPool, root: Path) -> None:
    shutil.rmtree(root / "shared")
    outcome, _ = pool.run(start, root, Plan(6, goes_back=True))
    assert outcome.ended == "PlatformError: killed" and "rolled back from step 5" in outcome.said
    assert {held.of.step for held in held_replicas(_disk(root, "beta"))} >= {4}
    outcome, _ = pool.run(start, root, Plan(3))
    assert "the replica of step 4 is not used: a rollback undid it" in outcome.said
    assert "step_0000002 (step 2)" in outcome.said and "restored" not in outcome.said


def test_bad_checkpoint_does_not_come_back(pool: RankPool, root: Path) -> None:
    for at_step in (5, 6):
        note_bad(root / "shared/run/checkpoints", 4, at_step)
    _lose_checkpoint(root)
    # A changed schedule lets bad ones be tried again, so none is changed.
    outcome, _ = pool.run(start, root, Plan(4))
    assert "the replica of step 4 is not used: training from it became NaN" in outcome.said
    assert "step_0000002 (step 2)" in outcome.said


def test_checkpoint_of_an_earlier_life_of_the_directory_does_not_come_back(
    pool: RankPool, root: Path
) -> None:
    shutil.rmtree(root / "shared")
    outcome, _ = pool.run(start, root, Plan(1))
    assert "the replica of step 4 is not used: " in outcome.said
    assert "checkpoints.jsonl lists no such durable checkpoint" in outcome.said
    assert outcome.ended == "finished after step 1"


class FakeCopier:
    """A process that is done when a test says so."""

    def __init__(self) -> None:
        self.tasks: list[Replicate] = []
        self.answer: Replicated | None = None
        self.is_cancelled = False

    def prepare(self) -> None: ...

    def submit(self, task: Replicate) -> None:
        self.tasks.append(task)
        self.answer = None

    def reply(self) -> Replicated | None:
        return self.answer

    def cancel(self) -> None:
        self.is_cancelled = True


def test_checkpoint_during_a_copy_is_left_out_and_the_next_one_copied(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    platform = Platform("cpu", torch.device("cpu"), 0, 1, "")
    copier, states = FakeCopier(), Mock()
    replication = Replication(platform, tmp_path / "replicas", copier, states)
    replication.start()
    for step in (2, 4, 6):
        checkpoint = tmp_path / f"step_{step:07d}"
        checkpoint.mkdir()
        (checkpoint / "manifest.json").write_text(f"of {step}")
        copier.answer = Replicated() if step == 6 else None
        replication.begin(checkpoint, ())
    assert [(task.of.step, task.kept and task.kept.step) for task in copier.tasks] == [
        (2, None),
        (6, 2),
    ]
    states.replica_left_out.assert_called_once_with(4, "step 2 is still copied by rank 0")
    states.replicated.assert_called_once_with(2)
    # The end of the run does not wait for ever.
    replication.settle(within_seconds=0)
    assert copier.is_cancelled and "step 6 has no replica" in caplog.text
    assert "not copied after 0 s" in states.not_replicated.call_args.args[1]
