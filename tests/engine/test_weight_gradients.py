"""Every linear's weight gradient is summed in fp32 inside its product, and only there."""

from unittest import mock

import pytest
import torch
from phi4_kernels.swiglu import swiglu_linear
from torch import nn

from phi4.engine import schedule
from phi4.engine.engine import Engine
from phi4.engine.model.weight_gradients import SwiGLULinearIntoMainGrad, add_weight_gradient
from phi4.stages.pretrain import NextToken
from tests.support.engines import batches_of, engine_on, tiny_recipe
from tests.support.ranks import RankPool, pool_fixture

SMALL = ("model.num_layers=2", "loss_head.form=logits")
BF16 = "precision.dtype=bf16"
LINEARS = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")
OVERLAPPED = (
    "parallel.data=2",
    "parallel.distributed_optimizer=true",
    "parallel.overlap_grad_reduce=true",
    "parallel.overlap_param_gather=true",
)
LAYOUTS = {
    "tp2": ("parallel.tensor=2",),
    "tp2+sp, bf16": ("parallel.tensor=2", "parallel.sequence=true", BF16),
    "pp2, full recompute": ("parallel.pipeline=2", "recompute.granularity=full"),
    "cp2": ("parallel.context=2",),
    "dp2, everything overlapped": OVERLAPPED,
}


pool = pool_fixture(2)


def weights_of(engine: Engine) -> dict[str, nn.Parameter]:
    """Of the layers' linears, by name."""
    named = [item for chunk in engine.bare_chunks for item in chunk.named_parameters()]
    return {name: p for name, p in named if name.split(".")[-2] in LINEARS}


def factors_of(chunk: nn.Module) -> dict[str, list[list[torch.Tensor]]]:
    """Fills, while the chunk trains, with [input, gradient of the output] of every forward."""
    factors: dict[str, list[list[torch.Tensor]]] = {}

    def watch(name: str, module: nn.Module) -> None:
        found = factors[f"{name}.weight"] = []

        def keep(_: nn.Module, inputs: tuple, outputs: tuple) -> None:
            if torch.is_grad_enabled():
                pair = [inputs[0].detach().flatten(0, 1)]
                outputs[0].register_hook(lambda grad: pair.append(grad.flatten(0, 1).clone()))
                found.append(pair)

        module.register_forward_hook(keep)

    for name, module in chunk.named_modules():
        if name.split(".")[-1] in LINEARS:
            watch(name, module)
    return factors


def unreduced(rank: int, world_size: int, overrides: tuple[str, ...]) -> tuple | None:
    """By weight: main_grad before it is reduced, and the factors it was made of."""
    with engine_on(rank, tiny_recipe(*SMALL, *overrides)) as engine:
        if engine is None:
            return None
        factors, found = factors_of(engine.bare_chunks[0]), {}

        def keep(*_: object, **__: object) -> None:
            weights = weights_of(engine)
            found.update({name: weight.main_grad.clone() for name, weight in weights.items()})

        with mock.patch.object(schedule, "finalize_model_grads", keep):
            engine.train_step(batches_of(engine, 0), NextToken(), learning_rate=0.0)
        return found, factors


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_gradients_are_the_fp32_accumulation_bit_for_bit(
    dtype: str, recompute: str, pool: RankPool
) -> None:
    overrides = (f"precision.dtype={dtype}", f"recompute.granularity={recompute}")
    found, factors = pool.run(unreduced, overrides)[0]
    assert len(found) == len(factors) == 4 * 2
    for name, main_grad in found.items():
        assert len(factors[name]) == 4
        summed = torch.zeros_like(main_grad)
        for x, grad in factors[name]:
            summed.addmm_(grad.float().t(), x.float())
        assert torch.equal(main_grad, summed), name
        exact = sum(grad.double().t() @ x.double() for x, grad in factors[name])
        assert (main_grad - exact).norm() <= 1e-6 * exact.norm(), name


def added_by_themselves(rank: int, world_size: int, overrides: tuple[str, ...]) -> list[str] | None:
    """Weights that added their gradient themselves: all but norms and the embedding."""
    with engine_on(rank, tiny_recipe(*SMALL, *overrides)) as engine:
        if engine is None:
            return None
        engine.train_step(batches_of(engine, 0), NextToken(), learning_rate=1e-2)
        named = [item for chunk in engine.bare_chunks for item in chunk.named_parameters()]
        fused = {name: p for name, p in named if p.grad_added_to_main_grad}
        matrices = {name for name, p in named if p.dim() > 1 and "embedding" not in name}
        assert matrices and set(fused) == matrices, set(fused) ^ matrices
        assert all(bool(parameter.main_grad.any()) for parameter in fused.values())
        return list(fused)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_linear_of_every_layout_adds_its_own_gradient(layout: str, pool: RankPool) -> None:
    for fused in pool.run(added_by_themselves, LAYOUTS[layout]):
        assert fused


def test_the_mlp_of_a_kernel_adds_the_gradient_that_autograd_would_have() -> None:
    gate_up, weight = torch.randn(6, 10).requires_grad_(), torch.randn(4, 5).requires_grad_()
    main_grad, incoming = torch.randn(4, 5), torch.randn(6, 4)
    expected = main_grad.clone()
    plain = swiglu_linear(gate_up, weight, implementation="torch")
    dgate_up, dweight = torch.autograd.grad(plain, (gate_up, weight), incoming)
    ours = SwiGLULinearIntoMainGrad.apply(gate_up, weight, main_grad, "torch")
    ours.backward(incoming)
    assert torch.equal(ours, plain) and torch.equal(gate_up.grad, dgate_up) and weight.grad is None
    torch.testing.assert_close(main_grad, expected + dweight, rtol=1e-6, atol=1e-6)


def test_products_of_bf16_are_not_rounded_to_it() -> None:
    # 2^12 and 1 do not fit in the 8 bits of one bf16 number.
    x, grad = torch.tensor([[64.0], [1.0]]).bfloat16(), torch.tensor([[64.0], [1.0]]).bfloat16()
    main_grad = torch.tensor([[0.5]])
    add_weight_gradient(x, grad, main_grad)
    assert main_grad.item() == 4097.5
