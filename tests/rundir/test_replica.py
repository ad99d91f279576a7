"""What lies in a replica directory, and which of it a run's records still name."""

import errno
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import msgspec
import pytest

from phi4.errors import CheckpointError
from phi4.rundir.manifest import LAYOUT_KEYS, CheckpointManifest, FileEntry, entry_of
from phi4.rundir.names import MANIFEST_FILE, STATE_FILE
from phi4.rundir.replica import Held, ReplicaId, held_replicas, replica_place, replicate
from phi4.rundir.roll_back import still_counts
from phi4.rundir.save_log import SaveLog, counting_manifests
from phi4.rundir.state import RunState, Skip

SHARDS = ("__0_0.distcp", "__1_0.distcp")


def _checkpoint(root: Path, step: int) -> tuple[Path, ReplicaId, dict[str, FileEntry]]:
    """A complete checkpoint of two ranks, and what it holds by name."""
    directory = root / f"step_{step:07d}"
    directory.mkdir(parents=True)
    files = {name: f"{name} of {step}".encode() for name in (*SHARDS, ".metadata")}
    files[STATE_FILE] = RunState(step=step, data={"drawn": 1}).to_json().encode()
    entries = {name: entry_of(content) for name, content in files.items()}
    manifest = CheckpointManifest(
        step=step,
        optimizer_format="full",
        layout=dict.fromkeys(LAYOUT_KEYS, 1),
        recipe_sha256="",
        data={},
        files=entries,
    )
    files[MANIFEST_FILE] = msgspec.json.encode(manifest)
    for name, content in files.items():
        (directory / name).write_bytes(content)
    digest = hashlib.sha256(files[MANIFEST_FILE]).hexdigest()
    return directory, ReplicaId(step, digest), entries


def _replicate(
    root: Path, place: Path, step: int, *, rank: int = 0, kept: ReplicaId | None = None
) -> ReplicaId:
    checkpoint, of, entries = _checkpoint(root, step)
    own = {SHARDS[rank]: entries[SHARDS[rank]]}
    leads = rank == 0
    replicate(checkpoint, place, of, own, with_small_files=leads, kept=kept, visible_seconds=0)
    return of


def test_host_holds_its_shards_and_the_small_files(tmp_path: Path) -> None:
    of = _replicate(tmp_path / "run", tmp_path / "replicas", 2)
    names = {SHARDS[0], ".metadata", STATE_FILE}
    (held,) = held_replicas(tmp_path / "replicas")
    assert held == Held(of, held.present, 4, RunState(step=2)) and set(held.present) == names
    there = {path.name for path in (tmp_path / "replicas" / of.name).iterdir()}
    assert there == names | {MANIFEST_FILE}
    # Of a file that was cut nothing is claimed.
    (tmp_path / "replicas" / of.name / SHARDS[0]).write_bytes(b"cut")
    (held,) = held_replicas(tmp_path / "replicas")
    assert set(held.present) == {".metadata", STATE_FILE}
    # A manifest that is not the one the directory is named by makes it nobody's.
    other, _, _ = _checkpoint(tmp_path / "other", 4)
    shutil.copy(other / MANIFEST_FILE, tmp_path / "replicas" / of.name)
    assert held_replicas(tmp_path / "replicas") == []


def test_only_the_one_that_is_kept_stays_besides_the_new_one(tmp_path: Path) -> None:
    place, kept = tmp_path / "replicas", None
    for step in (2, 4, 6):
        before, kept = kept, _replicate(tmp_path / "run", place, step, kept=kept)
    assert {path.name for path in place.iterdir()} == {before.name, kept.name}


def _left_something(of: ReplicaId, place: Path) -> bool:
    return any(SHARDS[0] in path.name for path in (place / of.name).iterdir())


@contextmanager
def _full_disk() -> Iterator[None]:
    refusal = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with patch("phi4.rundir.replica.os.write", side_effect=refusal):
        yield


def test_file_that_cannot_be_copied_is_named_and_leaves_nothing(tmp_path: Path) -> None:
    checkpoint, of, entries = _checkpoint(tmp_path / "run", 2)
    own, place = {SHARDS[0]: entries[SHARDS[0]]}, tmp_path / "replicas"
    arguments = {"with_small_files": False, "kept": None, "visible_seconds": 0}
    with _full_disk(), pytest.raises(OSError, match=rf"No space left on device: .*{SHARDS[0]}"):
        replicate(checkpoint, place, of, own, **arguments)
    assert not _left_something(of, place)
    (checkpoint / SHARDS[0]).write_bytes(b"another content")
    with pytest.raises(CheckpointError, match=r"__0_0.distcp has another size or sha256"):
        replicate(checkpoint, place, of, own, **arguments)
    assert not _left_something(of, place)
    (checkpoint / SHARDS[0]).unlink()
    with pytest.raises(OSError, match=r"No such file or directory: .*__0_0.distcp"):
        replicate(checkpoint, place, of, own, **arguments)
    (checkpoint / MANIFEST_FILE).write_bytes(b"{}")
    with pytest.raises(CheckpointError, match="not the checkpoint that was just saved"):
        replicate(checkpoint, place, of, {}, with_small_files=True, kept=None, visible_seconds=0)


def test_disk_that_is_not_mounted_is_not_made_up_for(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"No such file or directory: .*/disk/run"):
        _replicate(tmp_path / "run", tmp_path / "disk" / "run", 2)
    assert not (tmp_path / "disk").exists()


def test_runs_of_one_name_have_places_of_their_own(tmp_path: Path) -> None:
    places = {replica_place("/disk", str(tmp_path / user / "run")) for user in "ab"}
    assert len(places) == 2 and all(path.name.startswith("run-") for path in places)
    (tmp_path / "link").symlink_to(tmp_path / "a")
    (tmp_path / "a").mkdir()
    assert replica_place("/disk", str(tmp_path / "link" / "run")) in places


def _skip(after_step: int, reason: str) -> Skip:
    return Skip(after_step=after_step, last_undone=after_step + 3, units=8, rows=8, reason=reason)


def test_steps_that_any_roll_back_undid_do_not_count() -> None:
    first, second = _skip(10, "first"), _skip(20, "second")
    newest = RunState(step=20, skips=(first, second), roll_backs=2)
    assert still_counts(RunState(step=25), None)
    # Of the way that the second one undid, and of the way that the first one did.
    assert not still_counts(RunState(step=25, skips=(first,)), newest)
    assert not still_counts(RunState(step=15), newest)
    # On the way: before the first, at it, after it and after the second.
    for step, skips in ((5, ()), (10, ()), (15, (first,)), (20, (first,)), (25, (first, second))):
        assert still_counts(RunState(step=step, skips=skips), newest), step


def test_checkpoints_count_until_the_run_goes_back_behind_them(tmp_path: Path) -> None:
    log = SaveLog(tmp_path, 1)
    assert counting_manifests(tmp_path) == {}
    for step in (2, 4, 6):
        log.note(step, "scheduled")
        log.note(step, "durable", manifest_sha256=f"a{step}")
    log.note(8, "failed")
    assert counting_manifests(tmp_path) == {"a2": 2, "a4": 4, "a6": 6}
    log.note(4, "durable", manifest_sha256="b4")
    assert counting_manifests(tmp_path) == {"a2": 2, "b4": 4}
    # One whose manifest could not be read supersedes all the same.
    log.note(1, "durable")
    assert counting_manifests(tmp_path) == {}
