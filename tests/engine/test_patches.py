"""Each change to megatron-core is needed: without it a step, a save or a resumption fails."""

from pathlib import Path

import psutil
import pytest
import torch

from phi4.engine.checkpoint import load_checkpoint, save_checkpoint, verify_checkpoint
from phi4.engine.patches import DEVICE_LITERALS, PATCHES, Patches, check_megatron_version
from phi4.errors import PlatformError
from phi4.stages.pretrain import NextToken
from tests.support.engines import batches_of, engine_on, tiny_recipe
from tests.support.ranks import RankError, RankPool

PIPELINE, DATA = "parallel.pipeline=2", "parallel.data=2"
IN_FP8 = ("precision.dtype=bf16", "precision.fp8=torch", "parallel.fp8_param_gather=true")
NEEDED_BY = {"synchronize": DATA, "fp8_param_gather": DATA}
"""The layout that fails without a change, where that is not the pipeline."""
NAMES = [DEVICE_LITERALS, *(patch.name for patch in PATCHES)]


def _train_save_resume(
    rank: int, world_size: int, root: Path, layout: str, without: frozenset[str]
) -> float:
    recipe = tiny_recipe(
        layout,
        *(IN_FP8 if layout == DATA else ()),
        "model.num_layers=4",
        "parallel.distributed_optimizer=true",
        "recompute.granularity='full'",
    )
    loss = 0.0
    for first in (0, 2):
        with engine_on(rank, recipe, patches=Patches("cpu", without)) as engine:
            if first:
                checkpoint = root / f"step_{first:07d}"
                load_checkpoint(engine, checkpoint, verify_checkpoint(engine, checkpoint))
            for step in range(first, first + 2):
                result = engine.train_step(
                    batches_of(engine, step), NextToken(), learning_rate=1e-2
                )
                loss = result.loss
            save_checkpoint(engine, root, first + 2, form="full", keep=9, files={}, data={})
    leftovers = psutil.Process().children(recursive=True)
    assert not leftovers, f"the save left processes behind: {leftovers}"
    return loss


@pytest.fixture(scope="module")
def straight_losses(tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    """Loss of the last step with all patches, by layout."""
    with RankPool(2) as pool:
        root = tmp_path_factory.mktemp("all")
        return {
            layout: pool.run(_train_save_resume, root / layout, layout, frozenset())[0]
            for layout in (PIPELINE, DATA)
        }


def test_run_with_all_patches_trains_saves_and_resumes(straight_losses: dict[str, float]) -> None:
    assert all(0 < loss < 6 for loss in straight_losses.values())


@pytest.mark.parametrize("name", NAMES)
def test_run_without_a_patch_fails(
    name: str, tmp_path: Path, straight_losses: dict[str, float]
) -> None:
    layout = NEEDED_BY.get(name, PIPELINE)
    with RankPool(2) as pool, pytest.raises(RankError):
        loss = pool.run(_train_save_resume, tmp_path, layout, frozenset({name}))[0]
        if loss != straight_losses[layout]:
            raise RankError(0, f"the loss became {loss}, expected {straight_losses[layout]}")


def test_outside_of_the_context_torch_is_stock() -> None:
    before = (torch.cuda.current_device, torch.cuda.synchronize)
    with Patches("cpu") as patches, patches:
        assert torch.cuda.current_device() == torch.device("cpu")
        assert torch.zeros(1, device="cuda").device.type == "cpu"
    assert (torch.cuda.current_device, torch.cuda.synchronize) == before
    with pytest.raises((AssertionError, RuntimeError)):
        torch.zeros(1, device="cuda")


def test_context_is_left_clean_after_an_error() -> None:
    before = torch.cuda.current_device
    with pytest.raises(KeyError), Patches("cpu"):
        raise KeyError
    assert torch.cuda.current_device is before


def test_another_megatron_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("phi4.engine.patches.version", lambda _: "0.17.0")
    with pytest.raises(PlatformError, match=r"0\.17\.0.*0\.16\.1"):
        check_megatron_version()
