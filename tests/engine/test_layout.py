"""One process group per axis, on the device's backend alone."""

from pathlib import Path
from unittest import mock

from megatron.core import parallel_state

from phi4.engine.checkpoint import load_checkpoint, save_checkpoint, verify_checkpoint
from phi4.stages.pretrain import NextToken
from tests.support.engines import batches_of, engine_on, tiny_recipe
from tests.support.ranks import RankPool, pool_fixture

SHARDED = ("model.num_layers=2", "parallel.data=2", "parallel.distributed_optimizer=true")


pool = pool_fixture(2)


def named_backends(rank: int, world_size: int, root: Path) -> list[str]:
    """Backends that groups ask for by name while an engine trains, saves all and loads it."""
    kept = parallel_state.create_group
    with (
        mock.patch.object(parallel_state, "create_group", side_effect=kept) as create,
        engine_on(rank, tiny_recipe(*SHARDED)) as engine,
    ):
        engine.train_step(batches_of(engine, 0), NextToken(), learning_rate=1e-2)
        save_checkpoint(engine, root, 1, form="full", keep=1, files={}, data={})
        checkpoint = root / "step_0000001"
        load_checkpoint(engine, checkpoint, verify_checkpoint(engine, checkpoint))
        assert create.call_count > 0
        asked = [call.kwargs.get("backend") for call in create.call_args_list]
        return [backend for backend in asked if backend is not None]


def test_no_second_group_moves_host_memory(pool: RankPool, tmp_path: Path) -> None:
    assert pool.run(named_backends, tmp_path) == [[], []]
