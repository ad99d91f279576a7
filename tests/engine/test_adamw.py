"""One pass over the gradient after the norm, with the stock step's results and checkpoints."""

import hashlib
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from megatron.core.optimizer.optimizer import ChainedOptimizer
from phi4_kernels import cuda_library

from phi4.config import KernelsConfig
from phi4.engine import schedule
from phi4.engine.checkpoint import load_checkpoint, save_checkpoint, verify_checkpoint
from phi4.engine.engine import Engine
from phi4.engine.memory_use import KeptBytes, kept_bytes
from phi4.engine.model.host_batch import work_of
from phi4.engine.model.implementations import choose
from phi4.engine.objective import Loss
from phi4.engine.optimizer.adamw import OnePassChain
from phi4.errors import ConfigError
from phi4.stages.pretrain import NextToken
from phi4.verify.parity import micro_batches
from tests.support.engines import batches_of, engine_on, tiny_recipe
from tests.support.gradient_passes import Passes
from tests.support.ranks import RankPool, pool_fixture
from tools import build_csrc

BF16 = "precision.dtype='bf16'"
DISTRIBUTED = ("parallel.data=2", "parallel.distributed_optimizer=true")
KINDS = {
    "fp32": (),
    "bf16": (BF16,),
    "fp32 distributed": DISTRIBUTED,
    "bf16 distributed": (BF16, *DISTRIBUTED),
}
SMALL = ("model.num_layers=2", "optim.clip_grad=0.5")


pool = pool_fixture(2)


@pytest.fixture(scope="module")
def library() -> None:
    """The CUDA ops, whose host form runs here."""
    if shutil.which("nvcc") is None and cuda_library.missing():
        pytest.skip("nvcc is not on PATH, and csrc is not built")
    build_csrc.build()


class Spoiled(NextToken):
    """A loss that is not a number."""

    def __call__(self, *args) -> Loss:
        loss = super().__call__(*args)
        return Loss(loss.loss_sum * torch.nan, loss.weight_sum)


def state_of(engine: Engine) -> list[torch.Tensor]:
    """Parameters, masters and moments of this rank."""
    tensors = [p.detach() for chunk in engine.bare_chunks for p in chunk.parameters()]
    for optimizer in engine.optimizer.chained_optimizers:
        for group in optimizer.param_groups:
            for param in group["params"]:
                moments = optimizer.optimizer.state[param]
                tensors += [param.detach(), moments["exp_avg"], moments["exp_avg_sq"]]
    return tensors


def steps_of(engine: Engine) -> set[int]:
    return {group["step"] for group in engine.optimizer.param_groups if group["params"]}


def step_of(engine: Engine, stock: bool) -> Callable[..., tuple]:
    """OnePassChain.step, or megatron-core's own on gradients of the mean; it knows no limits."""

    def stock_step(self: OnePassChain, gradient_scale: torch.Tensor, *_: object) -> tuple:
        for chunk in engine.chunks:
            chunk.scale_gradients(gradient_scale)
        self.local_square_sum = torch.zeros(())
        return ChainedOptimizer.step(self)

    return stock_step if stock else OnePassChain.step


def train(engine: Engine, step: int, objective: NextToken | None = None):
    batches = batches_of(engine, step)
    return engine.train_step(batches, objective or NextToken(), learning_rate=1e-2)


def _passes(rank, world_size, overrides, stock):
    """(reads, writes) by operator in passes over this rank's gradients, for the second step.

    From the last backward pass on, where gradients are not reduced over ranks.
    """
    with engine_on(rank, tiny_recipe(*SMALL, *overrides)) as engine:
        if engine is None:
            return None
        train(engine, 0)
        buffers = [buffer.grad_data for chunk in engine.chunks for buffer in chunk.buffers]
        passes = Passes(buffers)
        owned = sum(p.numel() for g in engine.optimizer.param_groups for p in g["params"]) * 4
        step = step_of(engine, stock)

        def counted(call: Callable) -> Callable:
            def run(*arguments: object, **options: object) -> object:
                with passes:
                    return call(*arguments, **options)

            return run

        finalize = schedule.finalize_model_grads
        if engine.layout.dp_size == 1:
            finalize = counted(finalize)
        with (
            mock.patch.object(OnePassChain, "step", lambda *given: counted(step)(*given)),
            mock.patch.object(schedule, "finalize_model_grads", finalize),
        ):
            train(engine, 1)
        assert owned > 0
        return tuple(
            {
                name: round(n / owned, 6)
                for name, n in found.items()
                if not name.startswith("c10d::")
            }
            for found in (passes.reads, passes.writes)
        )


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_reads_the_gradient_twice_and_never_writes_it(
    kind: str, pool: RankPool, library: None
) -> None:
    asked = ("kernels.adamw='cuda'", "kernels.grad_norm='cuda'")
    for found in pool.run(_passes, (*KINDS[kind], *asked), False):
        if found is not None:
            assert found == ({"phi4::square_sum": 1.0, "phi4::adamw_": 1.0}, {})


def test_the_torch_form_reads_it_twice(pool: RankPool) -> None:
    reads, writes = pool.run(_passes, KINDS["bf16"], False)[0]
    assert reads == {"aten::_foreach_norm.Scalar": 1.0, "aten::_fused_adamw_": 1.0}
    assert set(writes) == {"aten::_fused_adamw_"}


def test_the_stock_step_takes_more_passes(pool: RankPool) -> None:
    reads, writes = pool.run(_passes, KINDS["bf16 distributed"], True)[0]
    assert sum(reads.values()) >= 3 and sum(writes.values()) >= 1


def _trained(rank, world_size, overrides, stock=False):
    """Losses and norms of some steps; whether bf16 weights are the rounded masters."""
    with engine_on(rank, tiny_recipe(*SMALL, *overrides)) as engine:
        if engine is None:
            return None
        step = step_of(engine, stock)
        with mock.patch.object(OnePassChain, "step", step):
            results = [train(engine, index) for index in range(4)]
        for optimizer in engine.optimizer.chained_optimizers:
            for master, weight in optimizer.weights.items():
                assert torch.equal(weight.flatten(), master.flatten().bfloat16())
        return [(result.loss, result.grad_norm) for result in results]


@pytest.mark.parametrize(
    ("kind", "implementation"),
    [
        ("fp32", "torch"),
        # These build the library first.
        pytest.param("bf16", "cuda", marks=pytest.mark.slow),
        pytest.param("fp32 distributed", "cuda", marks=pytest.mark.slow),
        ("bf16 distributed", "torch"),
    ],
)
def test_losses_are_those_of_the_stock_step(
    kind: str, implementation: str, pool: RankPool, request: pytest.FixtureRequest
) -> None:
    if implementation == "cuda":
        request.getfixturevalue("library")
    asked = [f"kernels.{op}='{implementation}'" for op in ("adamw", "grad_norm")]
    stock = pool.run(_trained, KINDS[kind], True)[0]
    ours = pool.run(_trained, (*KINDS[kind], *asked))[0]
    # A bf16 weight near the middle of two numbers may fall to either side.
    tolerance = 2e-6 if kind.startswith("fp32") else 2**-9
    for found, expected in zip(ours, stock, strict=True):
        assert found == pytest.approx(expected, rel=tolerance)


def _measured(rank, world_size, overrides):
    """Norm, group norms, whether asking changes a step; counted bytes and what they should be."""
    with engine_on(rank, tiny_recipe(*SMALL, *overrides)) as engine:
        if engine is None:
            return None
        batches, rate = batches_of(engine, 0), 1e-2
        plain = engine.train_step(batches, NextToken(), learning_rate=0.0)
        result = engine.train_step(batches, NextToken(), learning_rate=rate, by_group=True)
        assert plain.group_norms == {} and plain.grad_norm == result.grad_norm
        assert result.work == work_of(micro_batches(engine.recipe, 0, dp_rank=0, dp_size=1))
        buffers = [buffer for chunk in engine.chunks for buffer in chunk.buffers]
        owned = [p for g in engine.optimizer.param_groups for p in g["params"]]
        num_owned = sum(parameter.numel() for parameter in owned)
        padded = sum(buffer.grad_data.numel() for buffer in buffers)
        parameters = [p for chunk in engine.bare_chunks for p in chunk.parameters()]
        is_bf16 = parameters[0].dtype is torch.bfloat16
        distributed = engine.recipe.parallel.distributed_optimizer
        held = padded if distributed else sum(parameter.numel() for parameter in parameters)
        expected = KeptBytes(
            weights=held * (2 if is_bf16 else 4),
            gradients=padded * 4,
            optimizer=num_owned * (12 if is_bf16 else 8),
        )
        return result.grad_norm, result.group_norms, kept_bytes(engine), expected


@pytest.mark.parametrize("kind", KINDS)
def test_squares_of_group_norms_sum_to_the_norms_and_bytes_are_the_tensors(
    kind: str, pool: RankPool
) -> None:
    for found in pool.run(_measured, KINDS[kind]):
        if found is None:
            continue
        norm, groups, kept, expected = found
        assert set(groups) == {"embedding", "attention", "mlp", "norm", "head"}
        assert sum(value**2 for value in groups.values()) == pytest.approx(norm**2, rel=1e-12)
        assert all(0 < value < norm for value in groups.values())
        assert kept == expected


def _resumed(rank, world_size, overrides, root, form):
    """Hashes of this rank's state after four steps, straight and with a save in the middle."""
    hashes = []
    for splits in ((4,), (2, 4)):
        first = 0
        for last in splits:
            with engine_on(rank, tiny_recipe(*SMALL, *overrides)) as engine:
                if first:
                    checkpoint = root / f"step_{first:07d}"
                    load_checkpoint(engine, checkpoint, verify_checkpoint(engine, checkpoint))
                for step in range(first, last):
                    train(engine, step)
                assert steps_of(engine) == {last}
                if last == 2:
                    save_checkpoint(engine, root, last, form=form, keep=1, files={}, data={})
                parts = [t.flatten().view(torch.uint8).numpy() for t in state_of(engine)]
                first, found = last, [hashlib.sha256(part).hexdigest() for part in parts]
        hashes.append(found)
    return hashes


@pytest.mark.parametrize(
    ("kind", "form"), [("fp32 distributed", "dp"), ("bf16 distributed", "full")]
)
def test_resumption_is_exact(kind: str, form: str, pool: RankPool, tmp_path: Path) -> None:
    for straight, resumed in pool.run(_resumed, KINDS[kind], tmp_path, form):
        assert straight == resumed and len(straight) > 10


@pytest.mark.slow
def test_the_recipe_chooses_the_ops_and_the_choice_is_said(library: None) -> None:
    cpu = torch.device("cpu")
    said = [c.describe() for c in choose(KernelsConfig(adamw="cuda", grad_norm="torch"), cpu)]
    assert "adamw: cuda (named; host form of the kernel's arithmetic)" in said
    assert "grad_norm: torch (named)" in said
    with pytest.raises(ConfigError, match=r"kernels\.grad_norm=te: .*there are cuda, torch"):
        choose(KernelsConfig(grad_norm="te"), cpu)


def _without_labels(rank, world_size):
    with engine_on(rank, tiny_recipe(*SMALL)) as engine:
        if engine is None:
            return None
        masks = [replace(b, loss_mask=np.zeros_like(b.loss_mask)) for b in batches_of(engine, 0)]
        result = engine.train_step(masks, NextToken(), learning_rate=1e-2, weight_decay=0.5)
        finite = all(bool(tensor.isfinite().all()) for tensor in state_of(engine))
        return (result.loss, result.weight, result.grad_norm, result.updated), finite


def test_a_step_without_a_label_that_counts_has_gradients_of_zero(pool: RankPool) -> None:
    assert pool.run(_without_labels)[0] == ((0.0, 0.0, 0.0, True), True)


def _spoiled(rank, world_size, overrides):
    with engine_on(rank, tiny_recipe(*SMALL, *overrides)) as engine:
        train(engine, 0)
        before = [tensor.clone() for tensor in state_of(engine)]
        result = train(engine, 1, Spoiled())
        assert not result.updated and result.grad_norm != result.grad_norm
        assert steps_of(engine) == {1}
        assert all(torch.equal(a, b) for a, b in zip(before, state_of(engine), strict=True))
        assert train(engine, 2).updated and steps_of(engine) == {2}
        assert not torch.equal(before[0], state_of(engine)[0])


def test_a_gradient_that_is_not_finite_changes_nothing(pool: RankPool) -> None:
    pool.run(_spoiled, KINDS["bf16 distributed"])
