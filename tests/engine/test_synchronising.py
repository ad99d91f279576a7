"""Between two optimizer steps the host never waits for the device."""

from collections.abc import Callable, Iterator

import pytest
import torch

from phi4.engine.agreement import Asked
from phi4.engine.engine import Engine
from phi4.engine.objective import Loss
from phi4.stages.pretrain import NextToken
from tests.support.engines import batches_of, tiny_recipe
from tests.support.preference import NUM_MICRO_BATCHES, NUM_ROWS, Preference, pairs
from tests.support.ranks import RankPool
from tests.support.synchronising import engine_on_paper

AT_THE_END = ["aten::_to_copy to the host in step", "aten::_to_copy to the host in result"]
"""The norm and whether there was an update, then the loss: when all of the step is enqueued."""
SMALL = ("model.num_layers=2",)
LAYOUTS = {
    "one process": (),
    "bf16, full recompute": ("precision.dtype=bf16", "recompute.granularity=full"),
    "one pass": ("loss_head.form=one_pass",),
    "chunks": ("loss_head.form=recompute", "recompute.granularity=selective"),
    "tp2+sp": ("parallel.tensor=2", "parallel.sequence=true", "precision.dtype=bf16"),
    "tp2xcp2, ring": (
        "parallel.tensor=2",
        "parallel.context=2",
        "parallel.context_attention=ring",
    ),
    "pp2": ("parallel.pipeline=2",),
    "pp2-vpp2": (
        "parallel.pipeline=2",
        "parallel.virtual_pipeline=2",
        "model.num_layers=4",
        "parallel.overlap_p2p=true",
    ),
    "dp2, everything overlapped": (
        "parallel.data=2",
        "parallel.distributed_optimizer=true",
        "parallel.overlap_grad_reduce=true",
        "parallel.overlap_param_gather=true",
    ),
}


class Planted(NextToken):
    """Waits once per micro-batch."""

    def __init__(self, wait: Callable[[torch.Tensor], object]) -> None:
        self.wait = wait

    def __call__(self, inputs, segment_sum) -> Loss:
        loss = super().__call__(inputs, segment_sum)
        self.wait(loss.loss_sum)
        return loss


PLANTED = {
    "aten::_local_scalar_dense": lambda x: x.item(),
    "aten::_to_copy to the host": lambda x: x.cpu(),
    "aten::nonzero": lambda x: x.nonzero(),
    "aten::index": lambda x: x.view(1)[x.view(1) > 0],
    "aten::_to_copy to the device": lambda x: torch.ones(2).to(x.device, non_blocking=True),
    "tensor on the device": lambda x: torch.tensor([1.0, 2.0], device=x.device),
    "new_tensor on the device": lambda x: x.new_tensor([1.0, 2.0]),
    "aten::copy_ to the device": lambda x: x.detach().clone().copy_(torch.ones(())),
}


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    """One process, which is whichever rank is asked for."""
    with RankPool(1) as process:
        yield process


def waits(
    _rank: int, _world_size: int, overrides: tuple[str, ...], fake_rank: int, planted: str = ""
) -> tuple[list[str], int]:
    """What two steps wait for, and how many micro-batches one has."""
    with engine_on_paper(tiny_recipe(*SMALL, *overrides), fake_rank) as (engine, mode):
        objective = NextToken() if not planted else Planted(PLANTED[planted])
        with mode:
            for step in range(2):
                train(engine, step, objective)
        return mode.found, len(batches_of(engine, 0))


def train(engine: Engine, step: int, objective: NextToken) -> None:
    # As while a save is under way: what a rank tells goes to the device in every step.
    told = Asked(save_is_busy=True)
    batches = batches_of(engine, step)
    engine.train_step(batches, objective, learning_rate=1e-2, asked=lambda: told)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_step_waits_for_the_device_at_its_end_alone(layout: str, pool: RankPool) -> None:
    parallel = tiny_recipe(*SMALL, *LAYOUTS[layout]).parallel
    for rank in {0, parallel.model_parallel_size * parallel.data - 1}:
        found, _ = pool.run(waits, LAYOUTS[layout], rank)[0]
        assert found == 2 * AT_THE_END


@pytest.mark.parametrize("operator", PLANTED)
def test_a_planted_wait_is_found(operator: str, pool: RankPool) -> None:
    found, num_micro_batches = pool.run(waits, (), 0, operator)[0]
    planted = [one for one in found if one not in AT_THE_END]
    assert len(planted) == 2 * num_micro_batches
    assert all(one.startswith(f"{operator} in ") or one == operator for one in planted), planted


def waits_of_pairs(_rank: int, _world_size: int, overrides: tuple[str, ...]) -> list[str]:
    """What a step of preferences, with second labels at pivots, waits for."""
    sizes = (f"batch.global_batch_size={NUM_MICRO_BATCHES * NUM_ROWS}",)
    with engine_on_paper(tiny_recipe(*SMALL, *sizes, *overrides), 0) as (engine, mode):
        batches = [pairs(0, index) for index in range(NUM_MICRO_BATCHES)]
        with mode:
            engine.train_step(batches, Preference(), learning_rate=1e-2)
        return mode.found


@pytest.mark.parametrize("layout", ["chunks", "tp2+sp"])
def test_a_step_of_preferences_waits_at_its_end_alone(layout: str, pool: RankPool) -> None:
    assert pool.run(waits_of_pairs, LAYOUTS[layout])[0] == AT_THE_END
