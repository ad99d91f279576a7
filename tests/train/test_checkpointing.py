"""When a run saves, and which checkpoint it goes on from."""

import json
import re
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from unittest.mock import Mock, patch

import pytest

from phi4.config import dump_toml, with_overrides
from phi4.engine.agreement import wait_until_visible
from phi4.engine.checkpoint import save_checkpoint
from phi4.errors import DiskFullError, Phi4Error, PlatformError
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
        patch(f"{CHECKPOINTING}.predicted_gather_bytes", return_value=1 << 50),
        patch(f"{CHECKPOINTING}.host_memory_bytes", return_value=1 << 30),
        patch(f"{CHECKPOINTING}.save_checkpoint", save),
    ):
        checkpointer = Checkpointer(context)
        for step in range(1, 61):
            progress = Progress(RunState(step=step), 60, 1, 1.0, 0.1, None)
            checkpointer.save_when_due(progress, is_last=progress.is_last)
    return tried, "\n".join(said)


def test_save_that_failed_is_tried_again_soon_in_the_format_that_was_due() -> None:
    failing = {20: DiskFullError("full"), 22: PlatformError("stale"), 40: DiskFullError("full")}
    tried, said = _saves(
        failing, "checkpoint.every=20", "checkpoint.reshardable_every=20", "checkpoint.keep=1"
    )
    assert tried == [(step, "full") for step in (20, 22, 24, 40, 42, 60)]
    assert "step 20 is not saved: full; training goes on and tries again after step 22" in said


def test_routine_saves_stay_what_they_were() -> None:
    tried, _ = _saves({}, "checkpoint.every=10", "checkpoint.reshardable_every=40")
    assert tried == [(s, "full" if s == 40 else "dp") for s in (10, 20, 30, 40, 50, 60)]


def test_last_step_has_to_be_saved() -> None:
    with pytest.raises(DiskFullError):
        _saves({60: DiskFullError("full")}, "checkpoint.every=0")


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
    "stale": (None, "CheckpointError: no checkpoint .*rank 1 reads another", "step_0000002"),
    "record lost": (_lose_a_record, r"step 2 \[\]", "cannot be loaded: KeyError"),
    "other recipe": (_change_recipe, r"step 2 \[\]", "is not the one that its manifest.json"),
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
