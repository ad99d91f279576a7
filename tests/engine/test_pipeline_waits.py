"""Pipeline ranks exchange activations without waiting for their whole device."""

from unittest import mock

import torch

from phi4.stages.pretrain import NextToken
from tests.support.engines import batches_of, engine_on, tiny_recipe
from tests.support.ranks import RankPool, pool_fixture

pool = pool_fixture(2)


def waits(rank: int, world_size: int, batched_waits: bool) -> int:
    """How often a step over a pipeline waits for the whole device."""
    with engine_on(rank, tiny_recipe("parallel.pipeline=2", "model.num_layers=2")) as engine:
        assert engine.config.batch_p2p_comm
        engine.config.batch_p2p_sync |= batched_waits
        # Entered once more, the patches leave what stands for CUDA's call.
        with engine.patches, mock.patch.object(torch.cuda, "synchronize") as wait:
            engine.train_step(batches_of(engine, 0), NextToken(), learning_rate=1e-2)
        return wait.call_count


def test_a_pipeline_never_waits_for_the_whole_device(pool: RankPool) -> None:
    assert pool.run(waits, False) == [0, 0]
    assert all(count > 0 for count in pool.run(waits, True))
