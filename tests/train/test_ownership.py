"""A run and its directory: real ranks, one of which is blind, or whose directory is taken away."""

from contextlib import ExitStack, chdir
from functools import partial
from pathlib import Path
from unittest.mock import Mock, patch

import numpy as np
import pytest
import torch
from megatron.core import parallel_state

from phi4.engine.agreement import wait_until_visible
from phi4.engine.platform import Platform, disconnect
from phi4.errors import OwnershipError, Phi4Error
from phi4.rundir import Lease, this_process
from phi4.rundir.lease import take_lease
from phi4.rundir.state import RunState
from phi4.rundir.step_log import read_metrics
from phi4.stages.pretrain import NextToken
from phi4.track import Trackers
from phi4.train.checkpointing import Checkpointer
from phi4.train.hooks import CONTINUE, Continue, Hook, HookFactory, Progress
from phi4.train.session import run_training
from tests.support.byte_source import write_byte_source
from tests.support.engines import platform_of, tiny_recipe
from tests.support.ranks import gloo_group, pool_fixture, rendezvous

RECIPE = (
    *("tokenizer.kind=bpe", "tokenizer.path=bpe.tiktoken", "model.vocab_size=352"),
    *("model.num_layers=2", "run.steps=3", "data.sources=[{name='a', path='tokens'}]"),
)
TWO_STAGES = "parallel.pipeline=2"


pool = pool_fixture(2)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A tokenizer of the bytes and a source."""
    write_byte_source(tmp_path, np.arange(2000) % 256)
    return tmp_path


class TakenOver(Hook):
    """Another start takes the directory over after the first step."""

    def __init__(self, run_dir: Path) -> None:
        self._path = run_dir / "attempts" / "0000001.json"

    def act(self, progress: Progress) -> Continue:
        if progress.step == 1:
            (self._path.with_name("0000002.json")).write_bytes(self._path.read_bytes())
        return CONTINUE


def outcome(
    rank: int, root: Path, overrides: tuple[str, ...], hooks: tuple[HookFactory, ...] = ()
) -> str:
    """How a run of this rank ends."""
    recipe = tiny_recipe(*RECIPE, *overrides)
    platform = platform_of(rank, recipe)
    if platform is None:
        return ""
    with chdir(root):
        try:
            ending = run_training(recipe, platform, NextToken(), allow_change=True, hooks=hooks)
            return f"finished after step {ending.state.step}"
        except Phi4Error as error:
            return f"{type(error).__name__}: {error}"
        finally:
            parallel_state.destroy_model_parallel()
            disconnect()


def blind(rank: int, world_size: int, root: Path, hidden: str) -> str:
    """A run in which rank 1 does not see files with a name."""
    exists = Path.exists
    with ExitStack() as stack:
        briefly = partial(wait_until_visible, seconds=0.2)
        stack.enter_context(patch("phi4.train.ownership.wait_until_visible", briefly))
        if rank == 1:

            def sees(path: Path, **_: object) -> bool:
                return hidden not in str(path) and exists(path)

            stack.enter_context(patch.object(Path, "exists", sees))
        return outcome(rank, root, (TWO_STAGES, "run.dir=run"))


def test_rank_that_does_not_see_run_dir_is_named_before_anything_is_written(pool, root) -> None:
    first, second = pool.run(blind, root, "attempts")
    assert first == second and first.startswith("PlatformError: rank 1 on ")
    assert "does not see run/attempts/0000001.json" in first
    assert not (root / "run").exists()


FILE_SYSTEM_QUESTIONS = (
    "phi4.train.session.latest_checkpoint",
    "phi4.train.session.first_state",
    "phi4.train.initial_weights.read_recipe",
    "phi4.train.resume.read_recipe",
    "phi4.train.resume.read_state",
    "phi4.train.resume.read_roll_back",
    "phi4.engine.checkpoint.search.complete_checkpoints",
    "phi4.engine.checkpoint.search.find_checkpoint",
    "phi4.engine.checkpoint.search.latest_checkpoint",
)


def never(*_: object) -> None:
    raise AssertionError("a rank other than 0 asked the file system")


def without_asking(rank: int, world_size: int, root: Path, overrides: tuple[str, ...]) -> str:
    with ExitStack() as stack:
        for name in FILE_SYSTEM_QUESTIONS if rank == 1 else ():
            stack.enter_context(patch(name, never))
        return outcome(rank, root, (TWO_STAGES, *overrides))


def test_rank_0_alone_decides_where_a_run_begins(pool, root) -> None:
    assert pool.run(without_asking, root, ("run.dir=a",)) == ["finished after step 3"] * 2
    begun = ("run.dir=b", "run.init_from=a", "data.continue_from=a")
    assert pool.run(without_asking, root, begun) == ["finished after step 3"] * 2
    missing = pool.run(without_asking, root, ("run.dir=c", "run.init_from=nowhere"))
    assert missing[0] == missing[1] and "CheckpointError: no checkpoint in nowhere" in missing[0]
    assert not (root / "c").exists()


def lose(rank: int, world_size: int, root: Path) -> tuple[str, list[str]]:
    if rank:
        rendezvous()
        return "", []
    with patch.object(Trackers, "finish") as finish:
        said = outcome(rank, root, ("run.dir=run",), (lambda _: [TakenOver(root / "run")],))
        return said, [str(call) for call in finish.mock_calls]


def test_owner_that_was_replaced_writes_nothing_more(pool, root) -> None:
    said, finished = pool.run(lose, root)[0]
    assert said.startswith("OwnershipError: run was taken over by pid ")
    assert [m["step"] for m in read_metrics(root / "run/metrics.jsonl")] == [1]
    assert not list((root / "run").glob("checkpoints/step_*"))
    assert finished == [], "the run in the tracker is its new owner's"


def stop_before_a_save(rank: int, world_size: int, run_dir: Path) -> str:
    platform = Platform("cpu", torch.device("cpu"), rank, world_size, "test")
    lease = Lease(run_dir, 1, this_process()) if rank == 0 else None
    context = Mock(recipe=tiny_recipe(), platform=platform, lease=lease)
    progress = Progress(RunState(step=9), 9, 1, 1.0, 0.0, None)
    with gloo_group(rank, world_size), ExitStack() as stack:
        for question in ("predicted_gather_bytes", "host_memory_bytes"):
            stack.enter_context(patch(f"phi4.train.checkpointing.{question}"))
        with pytest.raises(OwnershipError) as lost:
            Checkpointer(context).save_when_due(progress, is_last=True)
        return str(lost.value)


def test_all_ranks_stop_before_a_save_that_is_no_longer_theirs(pool, tmp_path) -> None:
    first, second = pool.run(stop_before_a_save, tmp_path)
    assert first == second and "attempt 1 stops here" in first


def refused(rank: int, world_size: int, root: Path) -> str:
    return outcome(rank, root, (TWO_STAGES, "run.dir=run"))


def test_all_ranks_of_a_second_start_are_refused(pool, root) -> None:
    take_lease(root / "run", job="", say=print)
    first, second = pool.run(refused, root)
    assert first == second and first.startswith("OwnershipError: run.dir=run is owned by pid ")
    assert [path.name for path in (root / "run").iterdir()] == ["attempts"]
