"""A save that training does not wait for: what it saves, when it counts, and how it fails."""

import errno
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from unittest.mock import patch

import pytest

from phi4.engine.agreement import Asked, nothing_asked
from phi4.engine.checkpoint import (
    PendingSave,
    SaveRequest,
    load_checkpoint,
    save_checkpoint,
    verify_checkpoint,
)
from phi4.engine.engine import Engine
from phi4.errors import Phi4Error
from phi4.rundir.checkpoints import Retention, latest_checkpoint
from phi4.rundir.manifest import read_manifest
from phi4.stages.pretrain import NextToken
from phi4.writer import Staging, WriterProcess, shard_file
from phi4.writer import process as writer_process
from tests.support.engines import batches_of, engine_on, tiny_recipe
from tests.support.forked_writer import forked_writer
from tests.support.ranks import RankPool, pool_fixture
from tests.support.small_disk import ballast, mounted_small_disk
from tests.support.waiting import LONG_SECONDS, wait_until

_DP2 = ("model.num_layers=2", "parallel.data=2")
_DISTRIBUTED = "parallel.distributed_optimizer=true"


def _train(
    engine: Engine, step: int, asked: Callable[[], Asked] = nothing_asked
) -> tuple[float, Asked]:
    batches = batches_of(engine, step)
    result = engine.train_step(batches, NextToken(), learning_rate=1e-2, asked=asked)
    return result.loss, result.asked


def _told(pending: PendingSave) -> Asked:
    return Asked(False, False, False, *pending.told())


def _request(root: Path, step: int, form: str = "full") -> SaveRequest:
    return SaveRequest(root, step, form, Retention(2), {"a": "b"}, {})


def _begin(
    engine: Engine, request: SaveRequest, writer: WriterProcess, seconds: float = LONG_SECONDS
) -> PendingSave:
    return PendingSave(engine, request, writer, lease=None, seconds=seconds)


def _save_and_go_on(
    rank: int, world_size: int, root: Path, overrides: tuple[str, ...], form: str
) -> tuple[list[dict[str, object]], list[float]]:
    """Shards in the manifests of a save that waits and of one during which training goes on.

    Also the loss of the step after both, as training went on and from the second checkpoint.
    """
    with engine_on(rank, tiny_recipe(*overrides)) as engine:
        _train(engine, 0)
        waited = save_checkpoint(
            engine, root / "waited", 1, form=form, keep=1, files={"a": "b"}, data={}
        )
        with closing(forked_writer(Staging(engine.platform.device))) as writer:
            pending = _begin(engine, _request(root / "pending", 1, form), writer)
            went_on, agreed = _train(engine, 1, partial(_told, pending))
            assert latest_checkpoint(root / "pending") is None
            while (durable := pending.go_on(agreed)) is None:
                agreed = _train(engine, 2, partial(_told, pending))[1]
            path = durable.path
        load_checkpoint(engine, path, verify_checkpoint(engine, path))
        losses = [went_on, _train(engine, 1)[0]]
    return [
        {n: entry for n, entry in read_manifest(p).files.items() if n.endswith(".distcp")}
        for p in (waited, path)
    ], losses


def _loss_in_another_layout(rank: int, world_size: int, path: Path) -> float:
    with engine_on(rank, tiny_recipe(_DP2[0], _DISTRIBUTED, "parallel.tensor=2")) as engine:
        load_checkpoint(engine, path, verify_checkpoint(engine, path))
        return _train(engine, 1)[0]


pool = pool_fixture(2)


@pytest.mark.parametrize(
    ("overrides", "form"),
    [(_DP2, "full"), ((*_DP2, _DISTRIBUTED), "full"), ((*_DP2, _DISTRIBUTED), "dp")],
)
def test_save_holds_what_was_when_it_began(overrides, form, pool, tmp_path) -> None:
    (waited, pending), (went_on, resumed) = pool.run(_save_and_go_on, tmp_path, overrides, form)[0]
    assert went_on == resumed
    # megatron-core leaves the padding of its buffers, which dp saves, as it finds it.
    assert waited == pending or form == "dp"
    by_rank = [
        sum(entry.bytes for name, entry in pending.items() if name.startswith(f"__{rank}_"))
        for rank in (0, 1)
    ]
    assert sum(by_rank) == sum(entry.bytes for entry in waited.values())
    # Every data rank writes its share.
    assert min(by_rank) > 0.3 * sum(by_rank), by_rank
    if form == "full" and _DISTRIBUTED in overrides:
        path = tmp_path / "pending" / "step_0000001"
        assert pool.run(_loss_in_another_layout, path)[0] == pytest.approx(went_on, rel=5e-7)


def _failing(error: Exception, method: str, from_byte: int = 0) -> Callable[[Path], None]:
    """Writing a shard fails, once."""

    def spoil(place: Path) -> None:
        stream = shard_file._HashedStream
        sound = getattr(stream, method)

        def fails(self: shard_file._HashedStream, *content: bytes) -> object:
            if self.tell() + sum(map(len, content)) < from_byte:
                return sound(self, *content)
            setattr(stream, method, sound)
            self.error = error if isinstance(error, OSError) else None
            raise error

        setattr(stream, method, fails)

    return spoil


def _exits(place: Path) -> None:
    shard_file._HashedStream.sync = lambda self: os._exit(17)


def _waits(place: Path) -> None:
    """Says that it got to the end of its first shard, then waits for ever."""

    def sync(self: object) -> None:
        (place / f"at_{os.getpid()}").touch()
        while True:
            time.sleep(1)

    shard_file._HashedStream.sync = sync


def _exits_in_commit(place: Path) -> None:
    writer_process._commit = lambda task: os._exit(18)


def _exits_behind_commit(place: Path) -> None:
    commit = writer_process._commit

    def then_exit(task: object) -> None:
        commit(task)
        os._exit(19)

    writer_process._commit = then_exit


def _os_error(code: int) -> OSError:
    return OSError(code, os.strerror(code))


SPOILS: dict[str, Callable[[Path], None]] = {
    "first byte": _failing(_os_error(errno.ENOSPC), "write"),
    "middle": _failing(_os_error(errno.EDQUOT), "write", 20_000),
    "last fsync": _failing(_os_error(errno.ENOSPC), "sync", 20_000),
    "exit": _exits,
    "bug": _failing(KeyError("a bug"), "sync"),
    "killed": _waits,
    "late": _waits,
    "commit": _exits_in_commit,
    "behind commit": _exits_behind_commit,
}
GUILTY = {"commit": 0, "behind commit": 0}
"""The rank whose writer is spoilt; 1 for all others."""
SAID = {
    "first byte": "DiskFullError: .*rank 1 met: .*No space left on device: '.*distcp'",
    "middle": "DiskFullError: .*rank 1 met: .*quota exceeded: '.*distcp'",
    "last fsync": "DiskFullError: .*rank 1 met: .*No space left on device: '.*distcp'",
    "exit": "PlatformError: .*rank 1 met: its writer process .* ended with exit code 17",
    "bug": "PlatformError: .*rank 1 met: KeyError: 'a bug'",
    "killed": "PlatformError: .*rank 1 met: its writer process .* was ended by signal 9",
    "late": r"PlatformError: .*is not durable after 0 s \(checkpoint.write_seconds\), rank 1",
    "commit": "PlatformError: .*rank 0 met: its writer process .* ended with exit code 18",
    "behind commit": ".*step_0000002$",
}


def _spoilt_saves(rank: int, world_size: int, root: Path) -> dict[str, list[str]]:
    """For each fault: what the save said, what the newest checkpoint then was, the retry's end."""
    found = {}
    with engine_on(rank, tiny_recipe(*_DP2, _DISTRIBUTED)) as engine:
        _train(engine, 0)
        for kind in SPOILS:
            place = root / kind
            save_checkpoint(engine, place, 1, form="dp", keep=1, files={}, data={})
            found[kind] = _spoilt_save(engine, place, kind)
    return found


def _spoilt_save(engine: Engine, place: Path, kind: str) -> list[str]:
    rank, is_late = engine.platform.rank, kind == "late"
    guilty = rank == GUILTY.get(kind, 1)
    spoil = partial(SPOILS[kind], place) if guilty else lambda: None
    with closing(forked_writer(Staging(engine.platform.device), spoil)) as writer:
        seconds = 0 if guilty and is_late else LONG_SECONDS
        pending = _begin(engine, _request(place, 2), writer, seconds)
        if guilty and SPOILS[kind] is _waits:
            wait_until(lambda: (place / f"at_{writer.pid}").exists(), "the end of a shard")
            if not is_late:
                os.kill(writer.pid, signal.SIGKILL)
        try:
            said = str(pending.wait().path)
        except Phi4Error as error:
            said = f"{type(error).__name__}: {error}"
        newest = latest_checkpoint(place)
        load_checkpoint(engine, newest, verify_checkpoint(engine, newest))
        # The same processes try again: what failed must not be taken for what is written now.
        retried = _begin(engine, _request(place, 3), writer).wait().path
        verify_checkpoint(engine, retried)
    wait_until(lambda: not list(place.glob(".step_*")), "the end of what was given up")
    return [said, newest.name, retried.name]


def test_writer_that_fails_is_one_error_and_costs_nothing(pool: RankPool, tmp_path: Path) -> None:
    found, other = pool.run(_spoilt_saves, tmp_path)
    assert found == other
    for kind, (said, newest, retried) in found.items():
        assert re.match(SAID[kind], said), (kind, said)
        if kind == "behind commit":
            assert newest == "step_0000002"
        else:
            assert newest == "step_0000001", kind
            assert "earlier checkpoints are intact" in said and "\n" not in said, kind
        assert retried == "step_0000003", kind


def _fill_and_save(rank: int, world_size: int, disk: Path, free: list[int]) -> list[str]:
    """What saves under way say with less and less space, none of it predicted; then with enough."""
    said = []
    with engine_on(rank, tiny_recipe(*_DP2)) as engine:
        _train(engine, 0)
        save_checkpoint(engine, disk / "run", 1, form="full", keep=1, files={}, data={})
        with closing(forked_writer(Staging(engine.platform.device))) as writer:
            for step, free_bytes in enumerate([*free, None], start=2):
                if rank == 0:
                    wait_until(lambda: not list(disk.glob("run/.step_*")), "the discarded save")
                    ballast(disk, free_bytes)
                with patch("phi4.engine.checkpoint.saving.predicted_bytes", return_value=0):
                    said.append(_attempt(engine, disk / "run", step, writer))
        newest = latest_checkpoint(disk / "run")
        load_checkpoint(engine, newest, verify_checkpoint(engine, newest))
    return said


def _attempt(engine: Engine, root: Path, step: int, writer: WriterProcess) -> str:
    try:
        return str(_begin(engine, _request(root, step), writer).wait().path)
    except Phi4Error as error:
        newest = latest_checkpoint(root)
        load_checkpoint(engine, newest, verify_checkpoint(engine, newest))
        return f"{newest.name} {type(error).__name__}: {error}"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    with mounted_small_disk(tmp_path / "disk") as place:
        yield place


@pytest.mark.slow
def test_full_disk_is_named_wherever_it_strikes(pool: RankPool, small_disk: Path) -> None:
    # At the first byte, in a shard, and in the small files, when all shards are there.
    free = [4096, 131072, 344064]
    said, other = pool.run(_fill_and_save, small_disk, free)
    assert said == other and said[-1].endswith("step_0000005")
    for line in said[:-1]:
        assert line.startswith("step_0000001 DiskFullError: ") and "\n" not in line
        assert str(small_disk) in line and "No space left on device" in line
