"""When a run saves, and which checkpoint it goes on from."""

import json
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from unittest.mock import Mock, patch

import pytest

from phi4.config import dump_toml, with_overrides
from phi4.engine.agreement import Asked, wait_until_visible
from phi4.engine.checkpoint import Durable, save_checkpoint
from phi4.errors import DiskFullError, NotFiniteError, Phi4Error, PlatformError
from phi4.rundir.names import RECIPE_FILE, STATE_FILE
from phi4.rundir.state import RunState
from phi4.stages.pretrain import NextToken
from phi4.train.checkpointing import Checkpointer
from phi4.train.hooks import Progress
from phi4.train.resume import resume
from tests.support.engines import batches_of, engine_on, tiny_recipe
from tests.support.hostile import read_index, sign, write_index
from tests.support.ranks import RankPool

CHECKPOINTING = "phi4.train.checkpointing"
STEPS = (1, 2, 3)
_RESULT = Mock(asked=Asked())


def _saves(outcomes: dict[int, Exception], *overrides: str) -> tuple[list[tuple[int, str]], str]:
    """(step, format) of the saves that a run of 60 steps tries, and what it says."""
    recipe, said, tried = tiny_recipe("run.steps=60", *overrides), [], []

    def save(engine: object, root: Path, step: int, *, form: str, **_: object) -> Path:
        tried.append((step, form))
        if step in outcomes:
            raise outcomes[step]
        return root / str(step)

    context = Mock(recipe=recipe, say=said.append, source_hashes={}, lease=None)
    with (
        patch(f"{CHECKPOINTING}.require_ownership"),
        patch(f"{CHECKPOINTING}.require_finite_parameters"),
        patch(f"{CHECKPOINTING}.predicted_gather_bytes", return_value=1 << 50),
        patch(f"{CHECKPOINTING}.host_memory_bytes", return_value=1 << 30),
        patch(f"{CHECKPOINTING}.save_checkpoint", save),
    ):
        checkpointer = Checkpointer(context)
        for step in range(1, 61):
            progress = Progress(RunState(step=step), 60, 1, 1.0, 0.1, _RESULT)
            checkpointer.save_when_due(progress, is_last=progress.is_last)
    return tried, "\n".join(said)


def test_save_that_failed_is_tried_again_soon_in_the_format_that_was_due() -> None:
    failing = {20: DiskFullError("full"), 22: PlatformError("stale"), 40: DiskFullError("full")}
    tried, said = _saves(
        failing, "checkpoint.every=20", "checkpoint.reshardable_every=20", "checkpoint.keep=1"
    )
    assert tried == [(step, "full") for step in (20, 22, 24, 40, 42, 60)]
    assert "step 20 is not saved: full; training continues and tries again after step 22" in said


def test_routine_saves_stay_what_they_were() -> None:
    tried, _ = _saves({}, "checkpoint.every=10", "checkpoint.reshardable_every=40")
    assert tried == [(s, "full" if s == 40 else "dp") for s in (10, 20, 30, 40, 50, 60)]


def test_last_step_has_to_be_saved() -> None:
    with pytest.raises(DiskFullError):
        _saves({60: DiskFullError("full")}, "checkpoint.every=0")


class FakePending:
    """A save under way whose end a test decides: {step: (polls until it ends, its error)}."""

    ends: dict[int, tuple[int, Exception | None]]
    log: list[str]

    def __init__(self, engine, request, writer, *, lease, seconds) -> None:
        self.request, self.step, self.stall_seconds = request, request.step, 0.5
        self._polls, self._error = self.ends[self.step]
        self.log.append(f"begin {self.step} {request.form}")

    def told(self) -> tuple[bool, bool]:
        return True, False

    def go_on(self, agreed: Asked) -> Durable | None:
        self._polls -= 1
        if self._polls > 0:
            return None
        if self._error is not None:
            raise self._error
        self.log.append(f"durable {self.step}")
        return Durable(Path(str(self.step)), 2.0, 0.5)

    def wait(self, tick, *, within_seconds: float | None) -> Durable:
        self.log.append(f"wait {self.step}" + (f" {within_seconds:g} s" if within_seconds else ""))
        self._polls = 0
        return self.go_on(Asked())

    def abandon(self) -> None:
        self.log.append(f"abandon {self.step}")


@pytest.fixture(autouse=True)
def _finite() -> Iterator[Mock]:
    """Engines that are mocks have no weights to look at."""
    with patch(f"{CHECKPOINTING}.require_finite_parameters") as check:
        yield check


def _checkpointer(recipe, said: list[str]) -> Checkpointer:
    context = Mock(recipe=recipe, say=said.append, source_hashes={}, lease=None)
    with (
        patch(f"{CHECKPOINTING}.predicted_gather_bytes", return_value=1 << 50),
        patch(f"{CHECKPOINTING}.host_memory_bytes", return_value=1 << 30),
        patch(f"{CHECKPOINTING}.Staging"),
    ):
        return Checkpointer(context)


def _asynchronous(
    ends: dict[int, tuple[int, Exception | None]], num_steps: int, *overrides: str
) -> tuple[list[str], list[str], dict[int, dict[str, float]]]:
    """What happened in a run of asynchronous saves, what it said, and the numbers by step."""
    said, log, numbers = [], [], {}
    recipe = tiny_recipe(f"run.steps={num_steps}", "checkpoint.asynchronous=true", *overrides)
    checkpointer = _checkpointer(recipe, said)

    def save(engine: object, root: Path, step: int, **_: object) -> Path:
        log.append(f"saved {step}")
        return root / str(step)

    pending = type("Pending", (FakePending,), {"ends": ends, "log": log})
    with (
        patch(f"{CHECKPOINTING}.require_ownership"),
        patch(f"{CHECKPOINTING}.PendingSave", pending),
        patch(f"{CHECKPOINTING}.save_checkpoint", save),
    ):
        for step in range(1, num_steps + 1):
            progress = Progress(RunState(step=step), num_steps, 1, 1.0, 0.1, _RESULT)
            measured = checkpointer.hook.measure(progress)
            if measured:
                numbers[step] = measured
            checkpointer.save_when_due(progress, is_last=progress.is_last)
    return log, said, numbers


def test_one_save_is_under_way_and_the_next_is_put_off() -> None:
    log, said, numbers = _asynchronous(
        {2: (3, None), 5: (1, None), 6: (9, None)}, 8, "checkpoint.every=2"
    )
    # That of step 4 is made at step 5; the last waits for the one under way.
    assert log == [
        *("begin 2 dp", "durable 2", "begin 5 dp", "durable 5", "begin 6 dp"),
        *("wait 6", "durable 6", "saved 8"),
    ]
    assert numbers[6] == {"durable_step": 2, "save_seconds": 2.0, "save_stall_seconds": 0.5}
    assert numbers[7]["durable_step"] == 5
    assert said[0].startswith("checkpoint step 2 scheduled")
    assert said[1] == "the save of step 4 is put off until that of step 2 is durable"
    assert said[2] == "checkpoint step 2 durable after 2.0 s: 2"


def test_failed_save_under_way_is_made_again_soon_in_the_format_that_was_due() -> None:
    ends = {10: (3, PlatformError("gone")), 14: (1, None), 20: (1, None)}
    log, said, _ = _asynchronous(ends, 21, "checkpoint.every=10", "checkpoint.reshardable_every=10")
    assert log[:3] == ["begin 10 full", "begin 14 full", "durable 14"]
    assert said[1] == (
        "step 10 is not saved: gone; training continues and tries again after step 14"
    )


def test_save_under_way_that_fails_at_the_end_does_not_end_the_run() -> None:
    log, said, _ = _asynchronous({2: (9, DiskFullError("full"))}, 3, "checkpoint.every=2")
    assert log == ["begin 2 dp", "wait 2", "saved 3"]
    assert "step 2 is not saved: full" in said[1]


def test_run_that_is_told_to_stop_waits_half_of_its_time_for_a_save_under_way() -> None:
    log: list[str] = []
    ends = {1: (9, PlatformError("late"))}
    pending = type("Pending", (FakePending,), {"ends": ends, "log": log})
    asks = ("checkpoint.asynchronous=true", "reliability.stop_seconds=60")
    checkpointer = _checkpointer(tiny_recipe("run.steps=9", "checkpoint.every=1", *asks), [])
    with (
        patch(f"{CHECKPOINTING}.require_ownership"),
        patch(f"{CHECKPOINTING}.PendingSave", pending),
        patch(f"{CHECKPOINTING}.save_checkpoint", lambda e, root, step, **_: log.append(step)),
    ):
        for step, is_last in ((1, False), (2, True)):
            progress = Progress(RunState(step=step), 9, 1, 1.0, 0.1, _RESULT)
            checkpointer.save_when_due(progress, is_last=is_last)
    assert log == ["begin 1 dp", "wait 1 30 s", 2]


def test_save_under_way_is_given_up_when_the_run_fails() -> None:
    log: list[str] = []
    pending = type("Pending", (FakePending,), {"ends": {1: (9, None)}, "log": log})
    recipe = tiny_recipe("run.steps=9", "checkpoint.every=1", "checkpoint.asynchronous=true")
    checkpointer = _checkpointer(recipe, [])
    with (
        patch(f"{CHECKPOINTING}.require_ownership"),
        patch(f"{CHECKPOINTING}.PendingSave", pending),
    ):
        checkpointer.save_when_due(
            Progress(RunState(step=1), 9, 1, 1.0, 0.1, _RESULT), is_last=False
        )
    checkpointer.hook.close()
    assert log == ["begin 1 dp", "abandon 1"]


def test_weights_that_are_not_finite_are_not_saved(_finite: Mock) -> None:
    said: list[str] = []
    checkpointer = _checkpointer(tiny_recipe("run.steps=4", "checkpoint.every=1"), said)
    _finite.side_effect = [None, NotFiniteError("a is NaN")]
    saved = []
    with (
        patch(f"{CHECKPOINTING}.require_ownership"),
        patch(f"{CHECKPOINTING}.save_checkpoint", lambda e, root, step, **_: saved.append(step)),
    ):
        progress = [Progress(RunState(step=s), 4, 1, 1.0, 0.1, _RESULT) for s in (1, 2)]
        checkpointer.save_when_due(progress[0], is_last=False)
        with pytest.raises(NotFiniteError, match="a is NaN"):
            checkpointer.save_when_due(progress[1], is_last=False)
    assert saved == [1]
    assert said[1:] == ["step 2 is not saved: a is NaN; the checkpoints before it stay"]


def _write(rank: int, world_size: int, run: Path) -> None:
    """A run directory with a checkpoint of each step."""
    recipe = _recipe(run)
    with engine_on(rank, recipe) as engine:
        for step in STEPS:
            engine.train_step(batches_of(engine, step), NextToken(), learning_rate=1e-2)
            state = RunState(step=step, consumed_tokens=step).to_json()
            files = {RECIPE_FILE: dump_toml(recipe), STATE_FILE: state}
            root = run / "checkpoints"
            save_checkpoint(
                engine, root, step, form="full", keep=9, files=files, data={"web": "one"}
            )


def _recipe(run: Path):
    return tiny_recipe("model.num_layers=2", "parallel.data=2", f"run.dir={run}")


def _resumed(rank: int, world_size: int, runs: dict[str, Path]) -> dict[str, tuple[str, list[str]]]:
    """How a resumption of each run ended, and what was said."""
    found = {}
    first = _recipe(next(iter(runs.values())))
    with engine_on(rank, first) as engine:
        for name, run in runs.items():
            said: list[str] = []
            recipe = with_overrides(first, [f"run.dir={run}"])
            with _CIRCUMSTANCES.get(name, _plain)(rank):
                try:
                    state = resume(
                        recipe,
                        engine,
                        allow_change=True,
                        say=said.append,
                        source_hashes={"web": "two" if name == "other data" else "one"},
                    )
                    ended = f"step {state.step} {[change.key for change in state.history]}"
                except Phi4Error as error:
                    ended = f"{type(error).__name__}: {error}"
            found[name] = ended, said
    return found


def _plain(rank: int):
    return nullcontext()


def _blind(rank: int):
    """Rank 1 lists no checkpoint."""
    if rank == 0:
        return _plain(rank)
    return patch("phi4.rundir.checkpoints.Path.iterdir", return_value=iter(()))


def _elsewhere(rank: int):
    """Rank 1 sees no file of the checkpoint."""
    soon = partial(wait_until_visible, seconds=0.1)
    if rank == 0:
        return patch("phi4.engine.checkpoint.loading.wait_until_visible", soon)
    return patch.multiple(
        "phi4.engine.checkpoint.loading",
        wait_until_visible=lambda platform, paths: soon(platform, [Path("/nowhere/x"), *paths]),
    )


def _stale(rank: int):
    """Rank 1 reads another manifest."""
    if rank == 0:
        return _plain(rank)
    return patch("phi4.engine.checkpoint.loading.manifest_hash", return_value="other")


_CIRCUMSTANCES = {"blind": _blind, "elsewhere": _elsewhere, "stale": _stale}


def _lose_a_record(checkpoint: Path) -> None:
    index = read_index(checkpoint)
    del index.state_dict_metadata["optimizer.state.exp_avg.output_layer.weight"]
    for key in list(index.storage_data):
        if key.fqn == "optimizer.state.exp_avg.output_layer.weight":
            del index.storage_data[key]
    write_index(checkpoint, index)
    sign(checkpoint)


def _change_recipe(checkpoint: Path) -> None:
    path = checkpoint / RECIPE_FILE
    path.write_text(path.read_text().replace("seed = 1234", "seed = 1"))
    sign(checkpoint)


def _add_file(checkpoint: Path) -> None:
    (checkpoint / "note.txt").write_text("mine")


def _list_foreign_file(checkpoint: Path) -> None:
    path = checkpoint / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["files"]["../../x"] = {"bytes": 0, "sha256": ""}
    path.write_text(json.dumps(manifest))


CASES: dict[str, tuple[Callable[[Path], None] | None, str, str]] = {
    "whole": (None, r"step 3 \[\]", ""),
    "blind": (None, r"step 3 \[\]", ""),
    "elsewhere": (None, r"PlatformError: rank 1 on .* does not see /nowhere/x", ""),
    "stale": (None, "CheckpointError: no checkpoint .*rank 1 reads a different", "step_0000002"),
    "record lost": (_lose_a_record, r"step 2 \[\]", "cannot be loaded: KeyError"),
    "other recipe": (_change_recipe, r"step 2 \[\]", "does not match its manifest.json"),
    "foreign file": (_list_foreign_file, r"step 2 \[\]", "lists '../../x'"),
    "added file": (_add_file, r"step 3 \[\]", "note.txt, not listed in its manifest"),
    "other data": (None, "DataError: data source web holds other tokens.*another name", ""),
}


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory):
    """What both ranks of a pool found in each case."""
    root = tmp_path_factory.mktemp("runs")
    with RankPool(2) as pool:
        pool.run(_write, root / "run")
        runs = {}
        for number, (name, (damage, _, _)) in enumerate(CASES.items()):
            runs[name] = root / f"run{number}"
            shutil.copytree(root / "run", runs[name])
            if damage is not None:
                damage(runs[name] / "checkpoints/step_0000003")
        yield pool.run(_resumed, runs)


@pytest.mark.parametrize("name", CASES)
def test_resume_takes_what_holds_and_all_ranks_agree(name: str, resumed) -> None:
    (ended, said), other = (found[name] for found in resumed)
    _, expected, mentioned = CASES[name]
    assert re.match(expected, ended), ended
    assert other == (ended, said)
    assert mentioned in "\n".join(said) and all("\n" not in line for line in said)
