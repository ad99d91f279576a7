"""Checkpoints: any layout loads any other's, damage is found, a kill leaves the previous one."""

import re
import shutil
from pathlib import Path

import msgspec
import pytest

from phi4.config import CheckpointConfig
from phi4.engine.checkpoint import (
    load_checkpoint,
    optimizer_format,
    save_checkpoint,
    verify_checkpoint,
)
from phi4.engine.layout import destroy_layout
from phi4.errors import CheckpointError, Phi4Error
from phi4.rundir.checkpoints import (
    CheckpointDirectory,
    Retention,
    complete_checkpoints,
    find_checkpoint,
    latest_checkpoint,
)
from phi4.rundir.manifest import LAYOUT_KEYS, CheckpointManifest, read_manifest
from phi4.stages.pretrain import NextToken
from tests.support.engines import batches_of, engine_on, tiny_recipe
from tests.support.ranks import RankPool, pool_fixture

_SMALL = "model.num_layers=4"
_DISTRIBUTED = "parallel.distributed_optimizer=true"
_TP2 = ("parallel.tensor=2", "parallel.sequence=true")
_PP2 = ("parallel.pipeline=2",)
_VPP = (*_PP2, "parallel.virtual_pipeline=2", "parallel.overlap_p2p=true")
_DP2 = ("parallel.data=2",)
_CP2 = ("parallel.context=2",)

MOVES = [
    ("full", _TP2, _PP2),
    ("full", (_DISTRIBUTED, *_DP2), (_DISTRIBUTED, *_TP2)),
    ("dp", (_DISTRIBUTED, *_DP2), (_DISTRIBUTED,)),
]
MORE_MOVES = [
    ("full", _PP2, _TP2),
    ("full", _VPP, _CP2),
    ("full", (_DISTRIBUTED, *_TP2), (_DISTRIBUTED, *_PP2)),
    ("full", (_DISTRIBUTED, *_CP2), (_DISTRIBUTED, *_VPP)),
    ("dp", (_DISTRIBUTED, *_TP2), (_DISTRIBUTED, *_TP2)),
]


def _run(rank, world_size, overrides, root, first, last, form, keep=9):
    """Train steps first..last, resuming when first > 0; save; return losses and gradient norms."""
    found = []
    with engine_on(rank, tiny_recipe(_SMALL, *overrides)) as engine:
        if engine is None:
            return found
        if first:
            checkpoint = root / f"step_{first:07d}"
            load_checkpoint(engine, checkpoint, verify_checkpoint(engine, checkpoint))
        for step in range(first, last):
            result = engine.train_step(batches_of(engine, step), NextToken(), learning_rate=1e-2)
            found.append((result.loss, result.grad_norm))
        save_checkpoint(engine, root, last, form=form, keep=keep, files={"a": "b"}, data={})
    return found


def _verify(rank, world_size, root):
    with engine_on(rank, tiny_recipe(_SMALL, "parallel.data=2")) as engine:
        verify_checkpoint(engine, root / "step_0000001")


def _refusals(rank, world_size, refused, *arguments):
    """The error of a call that every rank refuses, so that the ranks can go on."""
    try:
        refused(rank, world_size, *arguments)
    except Phi4Error as error:
        destroy_layout()
        return f"{type(error).__name__}: {error}"
    return "not refused"


pool = pool_fixture(2)


@pytest.fixture(scope="module")
def straight(pool: RankPool, tmp_path_factory: pytest.TempPathFactory):
    """Losses and norms of four steps on one process, by distributed_optimizer."""
    root = tmp_path_factory.mktemp("straight")
    return {
        distributed: pool.run(
            _run, (_DISTRIBUTED,) if distributed else (), root / str(distributed), 0, 4, "full"
        )[0]
        for distributed in (False, True)
    }


@pytest.fixture(scope="module")
def saved_once(pool: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("saved")
    pool.run(_run, _DP2, root, 0, 1, "full")
    return root


@pytest.fixture
def saved(saved_once: Path, tmp_path: Path) -> Path:
    """A directory with one complete checkpoint of step 1, to be damaged."""
    return shutil.copytree(saved_once, tmp_path / "saved", symlinks=True)


def _assert_refused(pool: RankPool, message: str, call, *arguments) -> None:
    for refusal in pool.run(_refusals, call, *arguments):
        assert re.search(message, refusal), refusal


@pytest.mark.parametrize(
    ("form", "before", "after"),
    [*MOVES, *(pytest.param(*move, marks=pytest.mark.slow) for move in MORE_MOVES)],
)
def test_run_goes_on_in_another_layout(form, before, after, pool, straight, tmp_path) -> None:
    expected = straight[_DISTRIBUTED in before]
    found = pool.run(_run, before, tmp_path, 0, 2, form)[0]
    found += pool.run(_run, after, tmp_path, 2, 4, form)[0]
    for step, ((loss, norm), (true_loss, true_norm)) in enumerate(
        zip(found, expected, strict=True)
    ):
        assert loss == pytest.approx(true_loss, rel=5e-7), f"step {step}"
        assert norm == pytest.approx(true_norm, rel=2e-5), f"step {step}"


def test_dp_format_refuses_another_tensor_degree(pool: RankPool, tmp_path: Path) -> None:
    pool.run(_run, (_DISTRIBUTED, *_DP2), tmp_path, 0, 1, "dp")
    message = r"LayoutError.*tensor=1.*optimizer_format=full"
    _assert_refused(pool, message, _run, (_DISTRIBUTED, *_TP2), tmp_path, 1, 2, "full")


def test_plain_and_distributed_optimizer_are_not_mixed(pool: RankPool, saved: Path) -> None:
    message = r"LayoutError.*distributed_optimizer=false"
    _assert_refused(pool, message, _run, (_DISTRIBUTED, *_DP2), saved, 1, 2, "full")


@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing", "manifest"])
def test_damage_is_found_and_named(damage: str, pool: RankPool, saved: Path) -> None:
    checkpoint = saved / "step_0000001"
    victim = next(checkpoint.glob("*.distcp"))
    content = bytearray(victim.read_bytes())
    if damage == "truncated":
        victim.write_bytes(content[:-7])
    elif damage == "flipped":
        content[len(content) // 2] ^= 4
        victim.write_bytes(content)
    elif damage == "missing":
        victim.unlink()
    else:
        victim = checkpoint / "manifest.json"
        victim.write_bytes(victim.read_bytes()[:-20])
    _assert_refused(pool, rf"CheckpointError: .*{victim.name}", _verify, saved)


def test_whole_checkpoint_verifies(pool: RankPool, saved: Path) -> None:
    pool.run(_verify, saved)
    assert (saved / "step_0000001" / "a").read_text() == "b"


def test_older_checkpoints_are_pruned_and_latest_follows(pool: RankPool, tmp_path: Path) -> None:
    for last in (1, 2, 3):
        pool.run(_run, _DP2, tmp_path, last - 1, last, "full", 2)
    assert [p.name for p in complete_checkpoints(tmp_path)] == ["step_0000002", "step_0000003"]
    assert latest_checkpoint(tmp_path).name == "step_0000003"
    assert find_checkpoint(tmp_path) == tmp_path / "step_0000003"
    (tmp_path / "step_0000003" / "manifest.json").unlink()
    assert latest_checkpoint(tmp_path).name == "step_0000002"


def test_newest_reshardable_checkpoint_outlives_the_others(tmp_path: Path) -> None:
    forms = ("full", "dp", "full", "dp", "dp", "dp")
    for step, form in enumerate(forms, start=1):
        directory = CheckpointDirectory(tmp_path, step)
        directory.begin()
        layout = dict.fromkeys(LAYOUT_KEYS, 1)
        manifest = CheckpointManifest(
            step=step, optimizer_format=form, layout=layout, recipe_sha256="", data={}, files={}
        )
        directory.commit({}, msgspec.json.encode(manifest))
        directory.prune(Retention(2))
    assert [p.name[-1] for p in complete_checkpoints(tmp_path)] == ["3", "5", "6"]
    assert not list(tmp_path.glob(".step_*"))


def test_pinned_checkpoints_are_never_removed(tmp_path: Path) -> None:
    for step in range(1, 8):
        directory = CheckpointDirectory(tmp_path, step)
        directory.begin()
        layout = dict.fromkeys(LAYOUT_KEYS, 1)
        manifest = CheckpointManifest(
            step=step, optimizer_format="dp", layout=layout, recipe_sha256="", data={}, files={}
        )
        directory.commit({}, msgspec.json.encode(manifest))
        directory.prune(Retention(1, keep_every=3))
    assert [p.name[-1] for p in complete_checkpoints(tmp_path)] == ["3", "6", "7"]


def test_killed_save_leaves_the_previous_checkpoint(saved: Path, pool: RankPool) -> None:
    directory = CheckpointDirectory(saved, 2)
    directory.begin()
    (directory.partial / "half").write_text("x")
    assert latest_checkpoint(saved).name == "step_0000001"
    pool.run(_run, _DP2, saved, 1, 2, "full")
    assert latest_checkpoint(saved).name == "step_0000002"
    assert not list(saved.glob(".step_*"))
    assert "half" not in read_manifest(saved / "step_0000002").files


def test_manifest_of_another_version_is_refused(saved: Path) -> None:
    path = saved / "step_0000001" / "manifest.json"
    newer = msgspec.structs.replace(read_manifest(path.parent), version=99)
    path.write_bytes(msgspec.json.encode(newer))
    with pytest.raises(CheckpointError, match="version 99"):
        read_manifest(path.parent)


@pytest.mark.parametrize(
    ("asked", "gather_bytes", "due", "form"),
    [
        ("auto", 0, False, "full"),
        ("auto", 10**6, False, "full"),
        ("auto", 10**15, False, "dp"),
        ("auto", 10**15, True, "full"),
        ("dp", 0, True, "dp"),
        ("full", 10**15, False, "full"),
    ],
)
def test_optimizer_format_follows_the_memory(asked, gather_bytes, due, form) -> None:
    config = CheckpointConfig(optimizer_format=asked)
    assert optimizer_format(config, gather_bytes, 10**12, reshardable_due=due)[0] == form


def test_place_without_checkpoint_says_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="RUN/checkpoints"):
        find_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="does not exist"):
        find_checkpoint(tmp_path / "step_0000009")
