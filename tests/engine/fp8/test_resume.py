"""FP8 keeps no state: checkpoints are those of training without it, and so is what reads them."""

from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from phi4.config import dump_toml
from phi4.engine.checkpoint import (
    load_checkpoint,
    recipe_of,
    save_checkpoint,
    verify_checkpoint,
)
from phi4.engine.model.fp8.layers import fp8_linears
from phi4.errors import ConfigError
from phi4.rundir.checkpoints import find_checkpoint
from phi4.rundir.names import RECIPE_FILE
from phi4.stages.pretrain import NextToken
from tests.support.engines import batches_of, engine_on, tiny_recipe
from tests.support.ranks import RankPool, pool_fixture

RECIPE = (
    "model.num_layers=4",
    "model.hidden_size=128",
    "model.intermediate_size=128",
    "model.init_std=0.02",
    "batch.global_batch_size=8",
    "precision.fp8=torch",
    "parallel.distributed_optimizer=true",
)
TP2_SP = ("parallel.tensor=2", "parallel.sequence=true")
PP2 = ("parallel.pipeline=2",)


class Went(NamedTuple):
    """What a rank has seen.

    Attributes:
        losses: of its steps.
        start: hashes of the weights it began with.
        end: of those it ended with.
        scales: of every linear's weight in the last step, by its name; of whole matrices.
    """

    losses: list[float]
    start: dict[str, str]
    end: dict[str, str]
    scales: dict[str, float]


pool = pool_fixture(2)


def go(
    rank: int, world_size: int, overrides: tuple[str, ...], root: Path, first: int, last: int
) -> Went:
    """Train steps first to last, from a checkpoint where first > 0; save."""
    recipe = tiny_recipe(*RECIPE, *overrides)
    with engine_on(rank, recipe) as engine:
        if first:
            checkpoint = root / f"step_{first:07d}"
            load_checkpoint(engine, checkpoint, verify_checkpoint(engine, checkpoint))
        start = engine.weights_sha256()
        losses = [
            engine.train_step(batches_of(engine, step), NextToken(), learning_rate=1e-3).loss
            for step in range(first, last)
        ]
        scales = {
            f"{layer.layer_number} {name}": linear.weight_casts().forward_OI.inverse.item()
            for layer in engine.bare_chunks[0].decoder.layers
            for name, linear in layer.named_modules()
            if linear in list(fp8_linears([layer]))
        }
        files = {RECIPE_FILE: dump_toml(recipe)}
        save_checkpoint(engine, root, last, form="full", keep=9, files=files, data={})
        return Went(losses, start, engine.weights_sha256(), scales)


@pytest.fixture(scope="module")
def straight(pool: RankPool, tmp_path_factory: pytest.TempPathFactory) -> list[Went]:
    """Four steps on two tensor ranks."""
    return pool.run(go, TP2_SP, tmp_path_factory.mktemp("straight"), 0, 4)


@pytest.fixture(scope="module")
def root(pool: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps on two tensor ranks."""
    root = tmp_path_factory.mktemp("two_steps")
    pool.run(go, TP2_SP, root, 0, 2)
    return root


def test_resume_is_bitwise(pool: RankPool, straight: list[Went], root: Path) -> None:
    for went, expected in zip(pool.run(go, TP2_SP, root, 2, 4), straight, strict=True):
        assert went.losses == expected.losses[2:]
        assert went.end == expected.end
        assert went.scales == expected.scales and len(went.scales) == 8


def test_another_layout_goes_on_from_the_same_weights(
    pool: RankPool, straight: list[Went], root: Path
) -> None:
    same, other = (pool.run(go, layout, root, 2, 3) for layout in (TP2_SP, PP2))
    # Every weight's scale follows from the weights alone.
    assert other[0].start == same[0].start
    assert other[0].scales | other[1].scales == same[0].scales
    for went in other:
        assert went.losses == pytest.approx(straight[0].losses[2:3], rel=1e-4)


def evaluate(
    rank: int, world_size: int, overrides: tuple[str, ...]
) -> tuple[float, torch.Tensor, set[int]]:
    with engine_on(rank, tiny_recipe(*RECIPE, *overrides)) as engine:
        result = engine.evaluate(batches_of(engine, 0), NextToken())
        [logits, *_] = engine.logits(batches_of(engine, 0)[:1])
        products = {linear.counts.products for linear in fp8_linears(engine.bare_chunks)}
        return result.loss, logits, products


def test_evaluation_multiplies_as_without_fp8(pool: RankPool) -> None:
    (loss, logits, products), _ = pool.run(evaluate, TP2_SP)
    (plain_loss, plain_logits, none), _ = pool.run(evaluate, (*TP2_SP, "precision.fp8=off"))
    assert loss == plain_loss and torch.equal(logits, plain_logits)
    assert products == {0} and none == set()


def test_what_reads_weights_takes_them_without_fp8(root: Path) -> None:
    checkpoint = find_checkpoint(root)
    # Rows that FP8 could not take are no hindrance.
    recipe = recipe_of(checkpoint, ["batch.micro_batch_size=1", "batch.global_batch_size=1"])
    assert recipe.precision.fp8 == "off"
    with pytest.raises(ConfigError, match=r"precision\.fp8 are fixed by"):
        recipe_of(checkpoint, ["precision.fp8=torch"])
