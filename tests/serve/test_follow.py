"""A run's new checkpoints become a server's weights; what is wrong with one leaves the old ones."""

import asyncio
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from phi4.data.vocabulary.tokenizer import Tokenizer
from phi4.errors import CheckpointError
from phi4.rundir.bad_checkpoints import note_bad
from phi4.rundir.checkpoints import checkpoint_name, checkpoints_dir
from phi4.rundir.names import LATEST_FILE, MANIFEST_FILE
from phi4.sampling.protocol import Completion, Request
from phi4.serve.follow import CheckpointFollower, Weights, follow
from phi4.serve.traffic import Traffic
from tests.support.unhurried import UnhurriedSampler
from tests.support.waiting import wait_until

TOKENIZER = Tokenizer({bytes([value]): value for value in range(256)})


class Run:
    """A run that is served.

    Attributes:
        loaded: steps whose weights the model took.
        lines: that were said.
        fault: what is wrong with every checkpoint from now on, by the check or by the loading.
        id: that the model repeats.
    """

    def __init__(self, run_dir: Path) -> None:
        self.dir, self.root = run_dir, checkpoints_dir(run_dir)
        self.loaded: list[str] = []
        self.lines: list[str] = []
        self.checked: list[str] = []
        self.fault: dict[str, str] = {}
        self.id = 0
        self.write(0)
        self.traffic = Traffic(checkpoint_name(0), drain_seconds=0.0)
        self.weights = Weights(self.root / checkpoint_name(0), self.check, self.load)

    def write(self, step: int, content: str = "") -> Path:
        """A checkpoint as far as a follower looks at it."""
        path = self.root / checkpoint_name(step)
        path.mkdir(parents=True, exist_ok=True)
        (path / MANIFEST_FILE).write_text(f"{step} {content}")
        (self.root / LATEST_FILE).write_text(path.name)
        return path

    def check(self, checkpoint: Path) -> None:
        self.checked.append(checkpoint.name)
        if "check" in self.fault:
            raise CheckpointError(self.fault["check"])

    def load(self, checkpoint: Path) -> None:
        if "load" in self.fault:
            raise CheckpointError(self.fault["load"])
        if not checkpoint.is_dir():
            raise CheckpointError(f"{checkpoint} does not exist")
        self.loaded.append(checkpoint.name)
        self.id += 1

    def follower(self) -> CheckpointFollower:
        return CheckpointFollower(self.dir, self.traffic, self.weights, self.lines.append)

    def ids(self) -> list[int]:
        """What a request gets now; changes that were asked for come first."""

        async def ask() -> list[int]:
            ended = []
            async for _, happened in self.traffic.ask([Request(prompt=(1,), max_tokens=2)]):
                ended += [event for event in happened if isinstance(event, Completion)]
            return [token.id for token in ended[0].tokens]

        return asyncio.run(ask())


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    run = Run(tmp_path)
    with answering(run):
        yield run


@contextmanager
def answering(run: Run) -> Iterator[None]:
    sampler = UnhurriedSampler(lambda ids: {run.id: 1.0}, TOKENIZER)
    thread = threading.Thread(target=run.traffic.run, args=(sampler,))
    thread.start()
    try:
        yield
    finally:
        run.traffic.drain()
        thread.join()


def test_every_look_takes_what_is_new_and_nothing_twice(run: Run) -> None:
    follower = run.follower()
    follower.look()
    assert run.ids() == [0, 0] and run.traffic.weights == "step_0000000"
    for step in (1, 2):
        path = run.write(step)
        for _ in range(3):
            follower.look()
            assert run.ids() == [step] * 2
        assert run.traffic.weights == path.name
        assert run.lines[-1] == f"serving {path} from now on"
    assert run.loaded == run.checked == ["step_0000001", "step_0000002"]
    assert len(run.lines) == run.traffic.counts.reloads == 2


def test_run_that_went_back_is_followed_there(run: Run) -> None:
    follower = run.follower()
    for step, content in ((5, "first"), (3, ""), (5, "again")):
        run.write(step, content)
        follower.look()
        run.ids()
    assert run.loaded == ["step_0000005", "step_0000003", "step_0000005"]


@pytest.mark.parametrize("place", ["check", "load"])
def test_wrong_checkpoint_is_said_once_and_the_old_weights_go_on(run: Run, place: str) -> None:
    follower = run.follower()
    run.fault = {place: "it is damaged"}
    run.write(1)
    for _ in range(3):
        follower.look()
        assert run.ids() == [0, 0]
    assert run.lines == ["still serving step_0000000: it is damaged"]
    assert (run.traffic.weights, run.traffic.counts.reloads) == ("step_0000000", 0)
    run.fault = {}
    run.write(2)
    follower.look()
    assert run.ids() == [1, 1] and run.traffic.weights == "step_0000002"


def test_checkpoint_that_is_removed_before_it_is_read_is_no_error(run: Run) -> None:
    follower = run.follower()
    path = run.write(1)
    started, leaves = threading.Event(), threading.Event()

    async def keep_open() -> None:
        async for _ in run.traffic.ask([Request(prompt=(1,), max_tokens=1 << 30)]):
            started.set()
            if leaves.is_set():
                return

    client = threading.Thread(target=lambda: asyncio.run(keep_open()))
    client.start()
    started.wait()
    follower.look()
    shutil.rmtree(path)
    leaves.set()
    client.join()
    assert run.ids() == [0, 0]
    assert (run.checked, run.loaded, run.lines) == (["step_0000001"], [], [])


def test_checkpoint_that_training_calls_bad_is_left(run: Run) -> None:
    follower = run.follower()
    run.write(1)
    note_bad(run.root, 1, 2)
    assert note_bad(run.root, 1, 2) == 2
    follower.look()
    assert run.ids() == [0, 0] and run.checked == run.lines == []


def test_run_directory_that_cannot_be_read_is_looked_at_again(run: Run) -> None:
    follower = run.follower()
    aside = run.root.rename(run.root.with_name("aside"))
    follower.look()
    aside.rename(run.root)
    run.write(1)
    follower.look()
    assert run.ids() == [1, 1]


def test_thread_follows_until_the_block_ends(run: Run) -> None:
    with follow(run.dir, run.traffic, run.weights, run.lines.append, poll_seconds=0.01):
        run.write(1)
        wait_until(lambda: run.traffic.weights == "step_0000001", "the weights are others")
        run.write(2)
        wait_until(lambda: run.traffic.weights == "step_0000002", "the weights are others")
    run.write(3)
    assert "follow" not in [thread.name for thread in threading.enumerate()]
    assert run.ids() == [2, 2]
