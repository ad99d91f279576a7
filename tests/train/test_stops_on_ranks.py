"""A notice to one of two real ranks: both end after the same step, with one save."""

import threading
from contextlib import ExitStack, chdir
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
from megatron.core import parallel_state

from phi4.engine.engine import Engine
from phi4.engine.platform import connect, disconnect
from phi4.rundir.step_log import read_metrics
from phi4.stages.pretrain import NextToken
from phi4.track import Trackers
from phi4.train.checkpointing import Checkpointer
from phi4.train.reliability.requests import Requests
from phi4.train.session import run_training
from phi4.verify.drills.watched_run import saved_steps
from tests.support.byte_source import write_byte_source
from tests.support.engines import tiny_recipe
from tests.support.ranks import RankPool, pool_fixture, rendezvous

RECIPE = (
    *("tokenizer.kind=bpe", "tokenizer.path=bpe.tiktoken", "model.vocab_size=352"),
    *("model.num_layers=2", "parallel.pipeline=2", "run.steps=6", "run.dir=run"),
    *("data.sources=[{name='a', path='tokens'}]", "data.held_out=[{name='a', path='tokens'}]"),
    *("checkpoint.every=4", "evaluation.every=3", "evaluation.batches=3"),
)


@dataclass(frozen=True)
class Outcome:
    """How a run ended on one rank."""

    step: int | None
    exit_code: int
    statuses: list[str]
    num_evaluated: int
    said: str


pool = pool_fixture(2)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A tokenizer of the bytes and a source."""
    write_byte_source(tmp_path, np.arange(4000) % 256)
    return tmp_path


# What follows runs in the ranks.


def outcome(rank: int, world_size: int, root: Path, where: str, nth_call: int) -> Outcome:
    """A run in which rank 1 gets a notice right before the nth call of a function."""
    platform = connect("cpu", rank=rank, world_size=world_size, rendezvous=rendezvous())
    noticed, calls, said = threading.Event(), {"train_step": 0, "evaluate": 0, "_save": 0}, []
    if rank == 1 and where == "start":
        noticed.set()

    def counting(owner: type, name: str) -> object:
        method = getattr(owner, name)

        def call(*arguments: object, **options: object) -> object:
            calls[name] += 1
            if (rank, name, calls[name]) == (1, where, nth_call):
                noticed.set()
            return method(*arguments, **options)

        return patch.object(owner, name, call)

    with ExitStack() as stack:
        stack.enter_context(chdir(root))
        for owner, name in ((Engine, "train_step"), (Engine, "evaluate"), (Checkpointer, "_save")):
            stack.enter_context(counting(owner, name))
        finish = stack.enter_context(patch.object(Trackers, "finish"))
        stack.enter_context(patch("phi4.train.session.print_line", said.append))
        try:
            ending = run_training(
                tiny_recipe(*RECIPE),
                platform,
                NextToken(),
                allow_change=False,
                requests=Requests(noticed),
            )
        finally:
            parallel_state.destroy_model_parallel()
            disconnect()
    return Outcome(
        step=ending.state and ending.state.step,
        exit_code=ending.exit_code,
        statuses=[one.args[0] for one in finish.mock_calls],
        num_evaluated=calls["evaluate"],
        said="\n".join(said),
    )


# The tests.


@pytest.mark.parametrize(
    ("where", "nth_call", "step", "saved", "num_evaluated"),
    [
        ("train_step", 2, 2, {2}, 0),
        ("evaluate", 2, 3, {3}, 2),
        ("_save", 1, 4, {4}, 3),
    ],
)
def test_notice_to_one_rank_ends_all_with_one_save(
    pool: RankPool,
    root: Path,
    where: str,
    nth_call: int,
    step: int,
    saved: set[int],
    num_evaluated: int,
) -> None:
    ends = pool.run(outcome, root, where, nth_call)
    assert [(end.step, end.exit_code, end.statuses) for end in ends] == [
        (step, 5, ["interrupted"])
    ] * 2
    assert [end.num_evaluated for end in ends] == [num_evaluated] * 2
    assert saved_steps(root / "run") == saved
    lines = read_metrics(root / "run/metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, step + 1))
    assert ("held_out_loss" in lines[-1]) == (where != "evaluate" and step == 3)
    assert f"stopped after step {step} of 6: stopped by a signal" in ends[0].said


def test_notice_before_the_first_step_saves_nothing(pool: RankPool, root: Path) -> None:
    ends = pool.run(outcome, root, "start", 0)
    assert [(end.step, end.exit_code) for end in ends] == [(None, 5)] * 2
    assert "stopped before the first step" in ends[0].said
    assert not (root / "run").exists()


def test_stop_file_ends_the_run_for_good_and_goes(pool: RankPool, root: Path) -> None:
    (root / "run").mkdir()
    (root / "run/stop").touch()
    ends = pool.run(outcome, root, "nowhere", 0)
    assert [end.exit_code for end in ends] == [0, 0]
    assert "asked for by the file stop" in ends[0].said
    assert not (root / "run/stop").exists()
