"""FusedAdam's contract, in the torch form and in the host form of the kernel."""

import copy
from pathlib import Path

import pytest
import torch
from phi4_kernels.adamw import FusedAdam
from phi4_kernels.errors import DtypeError, ImplementationError, KernelError, ShapeError

SETTINGS = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
SHAPES = ((7, 5), (11,), (0,), ())
both = pytest.mark.parametrize("implementation", ["torch", "cuda"])


def parameters(dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
    draw = torch.Generator().manual_seed(3)
    return [torch.nn.Parameter(torch.randn(s, generator=draw).to(dtype)) for s in SHAPES]


def set_gradients(step: int, *groups: list[torch.nn.Parameter], scale: float = 1.0) -> None:
    draw = torch.Generator().manual_seed(step)
    for same in zip(*groups, strict=True):
        gradient = torch.randn(same[0].shape, generator=draw).to(same[0].dtype)
        for parameter in same:
            parameter.grad = (gradient * scale).to(parameter.dtype)


def test_torch_form_equals_torch_in_every_bit(loaded: Path) -> None:
    ours, theirs = parameters(), parameters()
    mine = FusedAdam(ours, **SETTINGS, implementation="torch")
    reference = torch.optim.AdamW(theirs, fused=True, **SETTINGS)
    for step in range(50):
        set_gradients(step, ours, theirs)
        mine.step()
        reference.step()
    assert mine.param_groups[0]["step"] == 50
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@both
@pytest.mark.parametrize("capturable", [False, True])
def test_updates_are_those_of_torch(loaded: Path, implementation: str, capturable: bool) -> None:
    ours, theirs = parameters(), parameters()
    mine = FusedAdam(ours, **SETTINGS, capturable=capturable, implementation=implementation)
    reference = torch.optim.AdamW(theirs, **SETTINGS)
    for step in range(20):
        set_gradients(step, ours, theirs)
        mine.step()
        reference.step()
    step = mine.param_groups[0]["step"]
    assert isinstance(step, torch.Tensor) is capturable and step == 20
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-6)


@both
@pytest.mark.parametrize("capturable", [False, True])
def test_grad_scaler_unscales_in_the_update_and_skips_overflows(
    loaded: Path, implementation: str, capturable: bool
) -> None:
    ours, plain = parameters(), parameters()
    options = SETTINGS | {"capturable": capturable, "implementation": implementation}
    mine, reference = FusedAdam(ours, **options), FusedAdam(plain, **options)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1)
    for step in range(6):
        scale = float(scaler.scale(torch.ones(())))
        overflows = step in (0, 3)
        set_gradients(step, ours, scale=torch.inf if overflows else scale)
        before = [p.detach().clone() for p in ours]
        assert scaler.step(mine) is None
        scaler.update()
        if overflows:
            assert all(torch.equal(a, b) for a, b in zip(ours, before, strict=True))
        else:
            set_gradients(step, plain)
            reference.step()
        assert scaler.get_scale() == scale * (0.5 if overflows else 2.0)
    assert not hasattr(mine, "grad_scale") and not hasattr(mine, "found_inf")
    assert mine.param_groups[0]["step"] == reference.param_groups[0]["step"] == 4
    # Powers of two scale without rounding.
    assert all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))


@both
def test_bf16_parameters_follow_fp32_masters(loaded: Path, implementation: str) -> None:
    half, single = parameters(torch.bfloat16), parameters()
    for a, b in zip(half, single, strict=True):
        b.data.copy_(a)
    options = SETTINGS | {"implementation": implementation}
    mine = FusedAdam(half, **options, master_weights=True)
    reference = FusedAdam(single, **options)
    for step in range(5):
        set_gradients(step, half)
        for a, b in zip(half, single, strict=True):
            b.grad = a.grad.float()
        mine.step()
        reference.step()
        if step == 2:
            mine = _reloaded(mine, half, master_weights=True, **options)
    for a, b in zip(half, single, strict=True):
        assert torch.equal(mine.state[a]["master_param"], b)
        assert mine.state[a]["exp_avg"].dtype == torch.float32
        assert torch.equal(a, b.bfloat16())


def _reloaded(optimizer: FusedAdam, params: list, **options: object) -> FusedAdam:
    fresh = FusedAdam(params, **options)
    fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    return fresh


@pytest.mark.parametrize(("before", "after"), [(False, True), (True, False)])
def test_a_state_loads_into_either_kind_of_step(before: bool, after: bool) -> None:
    ours, straight = parameters(), parameters()
    first = FusedAdam(ours, **SETTINGS, capturable=before)
    through = FusedAdam(straight, **SETTINGS, capturable=before)
    for step in range(4):
        set_gradients(step, ours, straight)
        if step == 2:
            first = _reloaded(first, ours, **SETTINGS, capturable=after)
        first.step()
        through.step()
    assert isinstance(first.param_groups[0]["step"], torch.Tensor) is after
    assert first.param_groups[0]["step"] == 4
    assert all(torch.equal(a, b) for a, b in zip(ours, straight, strict=True))


@pytest.mark.parametrize("capturable", [False, True])
def test_a_suppressed_update_that_is_retracted_does_not_count(capturable: bool) -> None:
    ours = parameters()
    mine = FusedAdam(ours, **SETTINGS, capturable=capturable, implementation="torch")
    for step, (overflow, count) in enumerate([(0.0, 1), (1.0, 1), (0.0, 2)]):
        set_gradients(step, ours)
        mine.update(found_inf=torch.tensor(overflow))
        if overflow:
            mine.retract()
        assert mine.param_groups[0]["step"] == count


@both
def test_updating_a_parameter_that_was_saved_for_backward_is_noticed(
    loaded: Path, implementation: str
) -> None:
    ours = parameters()
    squares = [parameter.square().sum() for parameter in ours]
    set_gradients(0, ours)
    FusedAdam(ours, **SETTINGS, implementation=implementation).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        sum(squares).backward()


def test_capturable_reads_the_rate_from_a_tensor(loaded: Path) -> None:
    ours, plain = parameters(), parameters()
    rate = torch.tensor(1e-2)
    mine = FusedAdam(ours, **SETTINGS | {"lr": rate}, capturable=True, implementation="cuda")
    reference = FusedAdam(plain, **SETTINGS, implementation="cuda")
    for step, lr in enumerate((0.5, 0.25)):
        set_gradients(step, ours, plain)
        rate.fill_(lr)
        reference.param_groups[0]["lr"] = lr
        mine.step()
        reference.step()
    assert all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))


def test_a_gradient_of_other_strides_is_read_right() -> None:
    ours, plain = (torch.nn.Parameter(torch.ones(3, 4)) for _ in range(2))
    plain.grad = torch.arange(12.0).view(3, 4)
    ours.grad = plain.grad.t().contiguous().t()
    for parameter in (ours, plain):
        FusedAdam([parameter], **SETTINGS).step()
    assert torch.equal(ours, plain)


def test_a_group_without_gradients_keeps_its_step() -> None:
    optimizer = FusedAdam([torch.nn.Parameter(torch.ones(2))])
    assert optimizer.step(lambda: 3.0) == 3.0
    assert "step" not in optimizer.param_groups[0]


def test_gradients_are_dropped_or_cleared_as_asked() -> None:
    (parameter,) = params = [torch.nn.Parameter(torch.ones(2))]
    for drops in (False, True):
        parameter.grad = torch.ones(2)
        FusedAdam(params, set_grad_none=drops).zero_grad()
        assert parameter.grad is None if drops else torch.equal(parameter.grad, torch.zeros(2))


def _with_state(param: torch.Tensor, **state: torch.Tensor) -> FusedAdam:
    parameter = torch.nn.Parameter(param)
    parameter.grad = torch.ones_like(param)
    optimizer = FusedAdam([parameter], master_weights=param.dtype == torch.bfloat16)
    optimizer.state[parameter] = state
    return optimizer


BAD = {
    "L2": (lambda: FusedAdam([torch.ones(2)], adam_w_mode=False), ImplementationError),
    "amsgrad": (lambda: FusedAdam([torch.ones(2)], amsgrad=True), ImplementationError),
    "no correction": (
        lambda: FusedAdam([torch.ones(2)], bias_correction=False), ImplementationError),
    "fp16": (lambda: _with_state(torch.ones(2).half()).step(), DtypeError),
    "transposed parameter": (lambda: _with_state(torch.ones(2, 3).t()).step(), ShapeError),
    "short master": (
        lambda: _with_state(torch.ones(4).bfloat16(), master_param=torch.ones(3)).step(),
        ShapeError),
    "bf16 master": (
        lambda: _with_state(torch.ones(4).bfloat16(), master_param=torch.ones(4).bfloat16()).step(),
        DtypeError),
    "short moment": (lambda: _with_state(torch.ones(4), exp_avg=torch.ones(3)).step(), ShapeError),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_is_named(name: str) -> None:
    call, error = BAD[name]
    with pytest.raises(error, match="expected") as raised:
        call()
    assert isinstance(raised.value, KernelError) and "\n" not in str(raised.value)


def test_bf16_without_masters_is_refused() -> None:
    parameter = torch.nn.Parameter(torch.ones(2).bfloat16())
    parameter.grad = torch.ones(2).bfloat16()
    with pytest.raises(DtypeError, match="master_weights=True"):
        FusedAdam([parameter]).step()
