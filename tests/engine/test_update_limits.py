"""A loss or gradient that is wrong on one rank: no rank updates, in the same step."""

import pytest
import torch

from phi4.engine.bits import digests
from phi4.engine.engine import Engine
from phi4.engine.objective import Loss
from phi4.engine.replicas import check_replicas, require_finite_parameters
from phi4.engine.step_values import UpdateLimits
from phi4.errors import CorruptionError, NotFiniteError
from phi4.stages.pretrain import NextToken
from tests.support.engines import batches_of, engine_on, tiny_recipe
from tests.support.ranks import RankPool, pool_fixture

SMALL = ("model.num_layers=2",)
DATA = ("parallel.data=2",)
LAYOUTS = {
    "data": DATA,
    "sharded": (*DATA, "parallel.distributed_optimizer=true"),
    "pipeline": ("parallel.pipeline=2",),
    "tensor": ("parallel.tensor=2",),
}
BRIEF = ("data",)


class WrongLoss(NextToken):
    """NaN in the loss alone; its gradient is right."""

    def __call__(self, *args) -> Loss:
        loss = super().__call__(*args)
        return Loss(loss.loss_sum + (loss.loss_sum * torch.nan).detach(), loss.weight_sum)


pool = pool_fixture(2)


def state_of(engine: Engine) -> list[int]:
    """Digests of this rank's weights and moments, and the step counts."""
    optimizers = engine.optimizer.chained_optimizers
    groups = [group for one in optimizers for group in one.param_groups]
    found = [p.detach() for chunk in engine.bare_chunks for p in chunk.parameters()]
    for one in optimizers:
        found += [t for p in one.optimizer.state.values() for t in p.values() if t.dim()]
    return [*digests(found).tolist(), *(group["step"] for group in groups if group["params"])]


def steps_with_limits(rank: int, world_size: int, layout: tuple[str, ...]) -> list | None:
    with engine_on(rank, tiny_recipe(*SMALL, *layout)) as engine:
        if engine is None:
            return None
        batches, found = batches_of(engine, 0), []

        def step(objective: NextToken, **limits: float):
            result = engine.train_step(
                batches, objective, learning_rate=1e-2, limits=UpdateLimits(**limits)
            )
            found.append((result.updated, result.loss, result.grad_norm))
            return result

        good = step(NextToken())
        before = state_of(engine)
        wrong_here = rank == 1 or "parallel.data=2" not in layout
        step(WrongLoss() if wrong_here else NextToken())
        at = step(NextToken(), loss=0.0)
        step(NextToken(), grad_norm=at.grad_norm * 0.999)
        again = engine.replay_step(batches, NextToken())
        same = torch.equal(again.loss_sums, at.evidence.loss_sums)
        same &= torch.equal(again.square_sum, at.evidence.square_sum)
        kept = state_of(engine) == before
        step(NextToken(), loss=at.loss, grad_norm=at.grad_norm)
        assert good.updated
        return [kept, same, state_of(engine) != before, found]


@pytest.mark.parametrize(
    "layout",
    [*BRIEF, *(pytest.param(n, marks=pytest.mark.slow) for n in LAYOUTS if n not in BRIEF)],
)
def test_step_beyond_its_limits_changes_nothing_on_any_rank(pool: RankPool, layout: str) -> None:
    ranks = pool.run(steps_with_limits, LAYOUTS[layout])
    for kept, same, moved, found in ranks:
        assert (kept, same, moved) == (True, True, True)
        assert [updated for updated, *_ in found] == [True, False, False, False, True]
        assert found[1][1] != found[1][1] and found[1][2] == found[2][2]
    assert str(ranks[0][3]) == str(ranks[1][3])


def spoil(rank: int, world_size: int) -> tuple[str, str]:
    """What the checks say of a NaN on rank 1."""
    with engine_on(rank, tiny_recipe(*SMALL, *DATA)) as engine:
        check_replicas(engine)
        require_finite_parameters(engine)
        if rank == 1:
            next(engine.bare_chunks[0].parameters()).detach().view(-1)[0] = torch.nan
        said = []
        for check in (check_replicas, require_finite_parameters):
            with pytest.raises((CorruptionError, NotFiniteError)) as error:
                check(engine)
            said.append(f"{type(error.value).__name__}: {error.value}")
        return tuple(said)


def test_parameters_that_differ_or_are_not_finite_are_named_on_every_rank(pool: RankPool) -> None:
    first, second = pool.run(spoil)
    assert first == second
    assert first[0].startswith("CorruptionError: one of rank 0 on ")
    assert " holds other bits of embedding.word_embeddings.weight than " in first[0]
    assert first[1].startswith("NotFiniteError: embedding.word_embeddings.weight on rank 1 on ")
