"""A save that cannot be written: every rank gets the same error, and nothing of it is left."""

import errno
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest.mock import patch

import pytest
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner

from phi4.engine.checkpoint import (
    load_checkpoint,
    predicted_bytes,
    save_checkpoint,
    verify_checkpoint,
)
from phi4.engine.checkpoint_io import VettedReader
from phi4.engine.engine import Engine
from phi4.errors import Phi4Error
from phi4.rundir.checkpoints import latest_checkpoint
from phi4.stages.pretrain import NextToken
from tests.support.engines import batches_of, engine_on, tiny_recipe
from tests.support.ranks import RankPool, pool_fixture
from tests.support.small_disk import ballast, mounted_small_disk

SAVING = "phi4.engine.checkpoint.saving"
DIRECTORY = "phi4.rundir.checkpoints"
PLACES = {
    "shard of rank 1": (1, "os.fsync", errno.ENOSPC),
    "quota of rank 1": (1, "phi4.writer.shard_file._save_tensor", errno.EDQUOT),
    "small file": (0, f"{DIRECTORY}.write_durably", errno.ENOSPC),
    "disk of rank 1": (1, "phi4.writer.shard_file._HashedStream.sync", errno.EIO),
    "commit": (0, f"{DIRECTORY}.CheckpointDirectory.commit", errno.ENOSPC),
}
_SMALL = ("model.num_layers=2", "parallel.data=2")


def _step(engine: Engine) -> None:
    """Before the first one the optimizer has no state to save."""
    engine.train_step(batches_of(engine, 0), NextToken(), learning_rate=1e-2)


def _save(engine: Engine, root: Path, step: int) -> Path:
    return save_checkpoint(engine, root, step, form="full", keep=1, files={"a": "b"}, data={})


def _attempt(engine: Engine, root: Path, step: int) -> str:
    try:
        return str(_save(engine, root, step))
    except Phi4Error as error:
        return f"{type(error).__name__}: {error}"


@contextmanager
def _failing(rank: int, place: str) -> Iterator[None]:
    """One rank's write to a place fails."""
    guilty, target, code = PLACES[place]
    with ExitStack() as stack:
        if rank == guilty:
            error = OSError(code, errno.errorcode[code])
            stack.enter_context(patch(target, side_effect=error))
        yield


def _fail_everywhere(rank: int, world_size: int, root: Path) -> dict[str, tuple[str, list[str]]]:
    """For each place, what the save said and what it left; then a save that works."""
    found = {}
    with engine_on(rank, tiny_recipe(*_SMALL)) as engine:
        _step(engine)
        _save(engine, root, 1)
        with patch(f"{SAVING}._free_bytes", return_value=1000):
            found["free space"] = _attempt(engine, root, 2), _names(root)
        for place in PLACES:
            with _failing(rank, place):
                found[place] = _attempt(engine, root, 2), _names(root)
        checkpoint = root / "step_0000001"
        load_checkpoint(engine, checkpoint, verify_checkpoint(engine, checkpoint))
        found[""] = _attempt(engine, root, 2), _names(root)
    return found


def _names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


pool = pool_fixture(2)


def test_failed_write_is_one_verdict_and_leaves_nothing(pool: RankPool, tmp_path: Path) -> None:
    found, other = pool.run(_fail_everywhere, tmp_path)
    assert {place: said for place, (said, _) in found.items()} == {
        place: said for place, (said, _) in other.items()
    }
    assert found.pop("") == (str(tmp_path / "step_0000002"), ["latest", "step_0000002"])
    codes = {"free space": errno.ENOSPC} | {place: code for place, (_, _, code) in PLACES.items()}
    for place, (said, names) in found.items():
        kind = "PlatformError" if codes[place] == errno.EIO else "DiskFullError"
        assert said.startswith(f"{kind}: checkpoint {tmp_path / 'step_0000002'} needs "), place
        assert errno.errorcode[codes[place]] in said or place == "free space"
        assert "\n" not in said and "earlier checkpoints are intact" in said, place
        assert names == ["latest", "step_0000001"], place
    assert "the file system has 1,000 free" in found["free space"][0]


@contextmanager
def _counting_reads(sizes: dict[str, int]) -> Iterator[None]:
    """Bytes of the records that this rank reads, as `read`."""
    read_data, sizes["read"] = VettedReader.read_data, 0

    def counted(self: VettedReader, plan: LoadPlan, planner: LoadPlanner) -> object:
        places = self.read_metadata().storage_data
        sizes["read"] += sum(places[item.storage_index].length for item in plan.items)
        return read_data(self, plan, planner)

    with patch.object(VettedReader, "read_data", counted):
        yield


def _alone_and_together(rank: int, world_size: int, root: Path) -> list[dict[str, int]]:
    """Bytes by rank of what data rank 0 writes alone and of what both write."""
    found = []
    with engine_on(rank, tiny_recipe(*_SMALL)) as engine:
        _step(engine)
        with patch(f"{SAVING}.FullyParallelSaveStrategyWrapper", lambda strategy, _: strategy):
            paths = [_save(engine, root / "alone", 1)]
        paths.append(_save(engine, root / "together", 1))
        for path in paths:
            checkpoint = verify_checkpoint(engine, path)
            sizes = {"all": sum(entry.bytes for entry in checkpoint.manifest.files.values())}
            with _counting_reads(sizes):
                load_checkpoint(engine, path, checkpoint)
            for name, entry in checkpoint.manifest.files.items():
                if name.endswith(".distcp"):
                    who = name.split("_")[2]
                    sizes[who] = sizes.get(who, 0) + entry.bytes
            found.append(sizes)
    return found


def test_data_ranks_share_what_one_wrote(pool: RankPool, tmp_path: Path) -> None:
    alone, together = pool.run(_alone_and_together, tmp_path)[0]
    assert together["0"] + together["1"] == alone["0"] + alone["1"]
    # Rank 1 has a row of the random state of its own.
    assert alone["1"] < 0.1 * alone["0"]
    assert min(together["0"], together["1"]) > 0.3 * alone["0"]
    # Each reads its share, and the random state besides.
    assert 0.3 * alone["0"] < together["read"] < 0.75 * alone["0"]
    # The index names ranks and files.
    assert abs(together["all"] - alone["all"]) < 0.01 * alone["all"]


def _save_other_states(rank: int, world_size: int, root: Path) -> None:
    """In one process, each with records that the one before it had not; then all load."""
    forms = ("none", "dp", "full", "dp")
    with engine_on(rank, tiny_recipe(*_SMALL, "parallel.distributed_optimizer=true")) as engine:
        for step, form in enumerate(forms, start=1):
            _step(engine)
            save_checkpoint(engine, root, step, form=form, keep=9, files={}, data={})
        for step, form in enumerate(forms, start=1):
            path = root / f"step_{step:07d}"
            verified = verify_checkpoint(engine, path)
            load_checkpoint(engine, path, verified, optimizer=form != "none")


def test_plan_is_that_of_the_state_that_is_saved(pool: RankPool, tmp_path: Path) -> None:
    pool.run(_save_other_states, tmp_path)


def _predicted_and_written(rank: int, world_size: int, root: Path, form: str, *overrides: str):
    with engine_on(rank, tiny_recipe(*_SMALL[:1], *overrides)) as engine:
        if engine is None:
            return None
        _step(engine)
        predicted = predicted_bytes(engine, form, {"a": "b"})
        path = save_checkpoint(engine, root, 1, form=form, keep=1, files={"a": "b"}, data={})
    return predicted, sum(file.stat().st_size for file in path.iterdir())


@pytest.mark.parametrize(
    ("form", "overrides"),
    [
        ("none", ("precision.dtype=bf16",)),
        ("full", ()),
        ("full", ("parallel.tensor=2", "precision.dtype=bf16")),
        ("full", ("parallel.data=2", "parallel.distributed_optimizer=true")),
        ("dp", ("parallel.data=2", "parallel.distributed_optimizer=true")),
    ],
)
def test_prediction_is_never_too_small(form, overrides, pool: RankPool, tmp_path: Path) -> None:
    predicted, written = pool.run(_predicted_and_written, tmp_path, form, *overrides)[0]
    # The rest is what is kept for the headers of records, most of it at this size.
    assert written <= predicted <= 1.3 * written + (1 << 16)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    with mounted_small_disk(tmp_path / "disk") as place:
        yield place


def _fill_and_save(rank: int, world_size: int, disk: Path, free: list[int]) -> list[str]:
    """What saves say with less and less space, none of it predicted; then with enough."""
    said = []
    with engine_on(rank, tiny_recipe(*_SMALL)) as engine:
        _step(engine)
        _save(engine, disk / "run", 1)
        for step, free_bytes in enumerate([*free, None], start=2):
            if rank == 0:
                ballast(disk, free_bytes)
            with patch(f"{SAVING}.predicted_bytes", return_value=0):
                said.append(_attempt(engine, disk / "run", step))
        checkpoint = latest_checkpoint(disk / "run")
        verify_checkpoint(engine, checkpoint)
    return said


@pytest.mark.slow
def test_full_disk_is_named_wherever_it_strikes(pool: RankPool, small_disk: Path) -> None:
    free = [4096, 16384, 65536, 131072, 262144, 344064]
    said, other = pool.run(_fill_and_save, small_disk, free)
    assert said == other and said[-1].endswith("step_0000008")
    assert [line.split(":")[0] for line in said[:-1]] == ["DiskFullError"] * len(free)
    assert all(str(small_disk) in line and "\n" not in line for line in said)
