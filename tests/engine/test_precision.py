"""bf16: the run learns, stays near fp32, and keeps masters, gradients and moments in fp32."""

import pytest
import torch

from phi4.stages.pretrain import NextToken
from tests.support.engines import batches_of, engine_on, tiny_recipe
from tests.support.ranks import RankPool, pool_fixture

STEPS = 8


def _losses(rank: int, world_size: int, overrides: tuple[str, ...]) -> list[float]:
    with engine_on(rank, tiny_recipe(*overrides)) as engine:
        if engine is None:
            return []
        expected = {"fp32": torch.float32, "bf16": torch.bfloat16}[engine.recipe.precision.dtype]
        for chunk in engine.bare_chunks:
            for parameter in chunk.parameters():
                assert parameter.dtype is expected
                assert parameter.main_grad.dtype is torch.float32
        losses = [
            engine.train_step(batches_of(engine, step), NextToken(), learning_rate=1e-2).loss
            for step in range(STEPS)
        ]
        for optimizer in engine.optimizer.chained_optimizers:
            for state in optimizer.optimizer.state.values():
                assert state["exp_avg"].dtype is state["exp_avg_sq"].dtype is torch.float32
        return losses


pool = pool_fixture(2)


@pytest.fixture(scope="module")
def fp32(pool: RankPool) -> list[float]:
    """Losses of one process."""
    return pool.run(_losses, ())[0]


@pytest.mark.parametrize(
    "layout",
    [
        (),
        pytest.param(
            ("parallel.tensor=2", "parallel.sequence=true", "parallel.distributed_optimizer=true"),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ("parallel.pipeline=2", "recompute.granularity='full'"), marks=pytest.mark.slow
        ),
        pytest.param(("parallel.context=2",), marks=pytest.mark.slow),
    ],
)
def test_bf16_stays_near_fp32(layout: tuple[str, ...], pool: RankPool, fp32: list[float]) -> None:
    bf16 = pool.run(_losses, ("precision.dtype='bf16'", *layout))[0]
    # bf16 keeps 8 bits of a number: losses of about 4.5 nats agree to a few units of 2^-8.
    assert bf16 == pytest.approx(fp32, rel=2**-6)
    assert bf16 != fp32
    assert bf16[-1] < bf16[0]
