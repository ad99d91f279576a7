"""Cases of AdamW for checks and benchmarks: the update alone, and a whole optimizer step."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from phi4_kernels.adamw import op, reference
from phi4_kernels.adamw.arguments import FP8Weight, Hyper, ParameterShard
from phi4_kernels.fp8_cast import reference as fp8_reference
from phi4_kernels.grad_norm import clip_factor, square_sum
from phi4_kernels.registry import CallInputs, Case, Cost, Entry
from phi4_kernels.testing import random_inputs

# One shard, shards that end inside a 16-byte access and inside a chunk of 4096, more shards than a
# launch takes, an empty shard, nothing.
_PROOF = (
    Case("cut", {"rows": 17, "width": 121, "cuts": (64, 65, 72, 1000)}),
    Case("whole", {"rows": 16, "width": 1024, "cuts": ()}),
    Case("many", {"rows": 90, "width": 97, "cuts": tuple(range(97, 90 * 97, 97))}),
    Case("empty-shards", {"rows": 5, "width": 8, "cuts": (0, 8, 8, 40)}),
    Case("one", {"rows": 1, "width": 1, "cuts": ()}),
    Case("empty", {"rows": 0, "width": 8, "cuts": ()}),
)
# 2^27 parameters of phi-4's largest matrices, cut like its layers: 180 MB of bf16 down to a norm.
_BENCH = (Case("n134M", {"rows": 2**14, "width": 2**13, "cuts": (5120, 78648320, 105912320)}),)
_HYPER = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}
_STEP = 3
_MAX_NORM = 1.0
_FP8_SCALE = 3.7


def _make(case: Case, dtype: torch.dtype) -> CallInputs:
    generator = case.generator()
    shape = (case.sizes["rows"], case.sizes["width"])
    param, exp_avg, root = (random_inputs.rows(shape, torch.float32, generator) for _ in range(3))
    tensors = {
        "param": param,
        "exp_avg": exp_avg,
        "exp_avg_sq": root.square(),
        "grad": random_inputs.rows(shape, dtype, generator),
        "weight": torch.zeros(shape, dtype=torch.bfloat16),
    }
    return CallInputs(tensors, {"cuts": case.sizes["cuts"]})


def _make_scaled(case: Case, dtype: torch.dtype) -> CallInputs:
    inputs = _make(case, dtype)
    return CallInputs(inputs.tensors, inputs.constants | {"grad_scale": torch.tensor(0.37)})


def _shards(cuts: Sequence[int], *tensors: Tensor) -> list[ParameterShard]:
    parts = (torch.tensor_split(tensor.view(-1), list(cuts)) for tensor in tensors)
    return [ParameterShard(*shard) for shard in zip(*parts, strict=True)]


def _adamw(
    param: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    grad: Tensor,
    weight: Tensor,
    cuts: Sequence[int],
    grad_scale: Tensor,
    implementation: str,
) -> tuple[Tensor, ...]:
    shards = _shards(cuts, param, exp_avg, exp_avg_sq, grad, weight)
    hyper = Hyper(**_HYPER)
    op.adamw(shards, _STEP, hyper, grad_scale=grad_scale, implementation=implementation)
    return param, exp_avg, exp_avg_sq, weight


def _define(
    param: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    grad: Tensor,
    weight: Tensor,
    cuts: Sequence[int],
    grad_scale: Tensor,
) -> tuple[Tensor, ...]:
    updated = reference.adamw(
        param, exp_avg, exp_avg_sq, grad, _STEP, **_HYPER, grad_scale=grad_scale
    )
    # In fp64 the weight's truth is not rounded.
    return *updated, updated[0].to(weight.dtype)


def _adamw_fp8(implementation: str, **arguments: Any) -> tuple[Tensor, ...]:
    param, cuts = arguments["param"], arguments["cuts"]
    names = ("param", "exp_avg", "exp_avg_sq", "grad", "weight")
    data = torch.empty(param.shape, dtype=torch.float8_e4m3fn, device=param.device)
    shards = [
        shard._replace(fp8=FP8Weight(part, param.new_full((), _FP8_SCALE), param.new_zeros(())))
        for shard, part in zip(
            _shards(cuts, *(arguments[name] for name in names)),
            torch.tensor_split(data.view(-1), list(cuts)),
            strict=True,
        )
    ]
    hyper = Hyper(**_HYPER)
    scale = arguments["grad_scale"]
    op.adamw(shards, _STEP, hyper, grad_scale=scale, implementation=implementation)
    return param, data


def _define_fp8(**arguments: Any) -> tuple[Tensor, ...]:
    param = _define(**arguments)[0]
    return param, fp8_reference.rounded(param * _FP8_SCALE, torch.float8_e4m3fn)


def _step(
    implementation: str, grad: Tensor, cuts: Sequence[int], **tensors: Tensor
) -> tuple[Tensor, ...]:
    # As in training: norm, clip factor and update, without a value on the host.
    gradients = torch.tensor_split(grad.view(-1), list(cuts))
    total = square_sum(gradients, implementation=implementation)
    scale = clip_factor(total, _MAX_NORM)
    return _adamw(**tensors, grad=grad, cuts=cuts, grad_scale=scale, implementation=implementation)


def _define_step(grad: Tensor, **arguments: Any) -> tuple[Tensor, ...]:
    # scale = min(1, max_norm / |g|), from the norm over all shards
    wide = grad.to(arguments["param"].dtype)
    scale = (_MAX_NORM / wide.square().sum().sqrt()).clamp(max=1.0)
    return _define(grad=grad, grad_scale=scale, **arguments)


def with_fused_adam(fused_adam: Any) -> Any:
    """The whole step by another optimizer of FusedAdam's contract: clip, step, copy.

    Args:
        fused_adam: its class.
    """

    built: dict[int, tuple[Any, list[torch.nn.Parameter]]] = {}

    def run(
        param: Tensor,
        exp_avg: Tensor,
        exp_avg_sq: Tensor,
        grad: Tensor,
        weight: Tensor,
        cuts: Sequence[int],
    ) -> tuple[Tensor, ...]:
        # Built once, outside of a capture; its state keeps the memory of its key from being reused.
        if param.data_ptr() not in built:
            shards = _shards(cuts, param, exp_avg, exp_avg_sq, grad)
            built[param.data_ptr()] = _optimizer_of(fused_adam, shards)
        optimizer, parameters = built[param.data_ptr()]
        torch.nn.utils.clip_grad_norm_(parameters, _MAX_NORM, foreach=True)
        optimizer.step()
        weight.copy_(param)
        return param, exp_avg, exp_avg_sq, weight

    return run


def _optimizer_of(
    fused_adam: Any, shards: list[ParameterShard]
) -> tuple[Any, list[torch.nn.Parameter]]:
    parameters = [torch.nn.Parameter(shard.param) for shard in shards]
    hyper = {"lr": _HYPER["lr"], "betas": (_HYPER["beta1"], _HYPER["beta2"])}
    hyper |= {"eps": _HYPER["eps"], "weight_decay": _HYPER["weight_decay"]}
    optimizer = fused_adam(parameters, adam_w_mode=True, **hyper)
    # The next step of the optimizer is the one that the definition makes.
    optimizer.param_groups[0]["step"] = _STEP - 1
    for parameter, shard in zip(parameters, shards, strict=True):
        parameter.grad = shard.grad
        optimizer.state[parameter] = {"exp_avg": shard.exp_avg, "exp_avg_sq": shard.exp_avg_sq}
    return optimizer, parameters


def _cost(other_bytes: int, num_reads: int) -> Any:
    def cost(case: Case, dtype: torch.dtype) -> dict[str, Cost]:
        size = case.sizes["rows"] * case.sizes["width"]
        each = other_bytes + num_reads * dtype.itemsize
        formula = f"N * ({other_bytes} + {num_reads} * {dtype.itemsize}) B"
        return {"forward": Cost(each * size, 20 * size, formula)}

    return cost


_entry = partial(
    Entry,
    op="adamw",
    proof_cases=_PROOF,
    shipped_cases=(),
    bench_cases=_BENCH,
    differentiable=False,
)
_BOTH = (torch.float32, torch.bfloat16)

# Besides the gradient: fp32 parameter and moments read and written (24), weights written.
ENTRIES = (
    _entry(
        name="adamw",
        function=_adamw,
        reference=_define,
        make=_make_scaled,
        cost=_cost(26, 1),
        dtypes=_BOTH,
    ),
    _entry(
        name="adamw_fp8",
        function=_adamw_fp8,
        reference=_define_fp8,
        make=_make_scaled,
        cost=_cost(27, 1),
        dtypes=_BOTH,
    ),
    _entry(
        name="optimizer_step",
        function=_step,
        reference=_define_step,
        make=_make,
        cost=_cost(26, 2),
        dtypes=(torch.float32,),
    ),
)
