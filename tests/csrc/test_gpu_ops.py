"""What only a GPU can show of the CUDA ops: the kernels' numbers, streams, graphs. `make gpu`."""

import math

import pytest
import torch
from phi4_kernels import registry
from phi4_kernels.adamw import FP8Weight, FusedAdam, Hyper, ParameterShard, adamw, reference
from phi4_kernels.fp8_cast import cast_blocks, cast_tensor
from phi4_kernels.grad_norm import clip_factor, square_sum
from phi4_kernels.testing import error_rule, gates, numerics
from torch import Tensor
from torch.library import opcheck

pytestmark = pytest.mark.gpu

CUDA = "cuda"
ENTRIES = list(registry.entries("cuda").values())
CHECKS = [check for entry in ENTRIES for check in gates.names(entry)]
HYPER = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}
REPEATS = 200
ROWS, WIDTH = 17, 121


def expect_equal(ours: Tensor, expected: Tensor) -> None:
    """Equal numbers, NaN where NaN is; through fp64, which holds every dtype here."""
    assert ours.shape == expected.shape and ours.dtype == expected.dtype
    torch.testing.assert_close(
        ours.cpu().double(), expected.cpu().double(), rtol=0, atol=0, equal_nan=True
    )


def make_shard(size: int, seed: int = 1, grad_dtype: torch.dtype = torch.float32) -> ParameterShard:
    draw = torch.Generator(CUDA).manual_seed(seed)
    param, exp_avg, root, grad = torch.randn(4, size, generator=draw, device=CUDA)
    weight = param.bfloat16()
    return ParameterShard(param, exp_avg, root.square(), grad.to(grad_dtype), weight)


@pytest.mark.parametrize(("entry", "case", "dtype"), CHECKS)
def test_kernels_obey_the_error_rule(entry: str, case: str, dtype: str) -> None:
    gates.check_numbers(entry, case, dtype, "cuda", CUDA)


@pytest.mark.parametrize(("entry", "case", "dtype"), CHECKS)
def test_kernels_equal_their_host_forms_in_every_bit(entry: str, case: str, dtype: str) -> None:
    found, at = registry.entries()[entry], gates.DTYPES[dtype]
    (sizes,) = (known for known in found.proof_cases if known.name == case)
    there, _ = numerics.run(found, sizes, at, "cuda", CUDA)
    here, _ = numerics.run(found, sizes, at, "cuda", "cpu")
    for name, expected in here.items():
        expect_equal(there[name], expected)


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_many_runs_agree_in_every_bit_under_load(entry) -> None:
    case, dtype = entry.proof_cases[0], entry.dtypes[0]
    first, again = numerics.run(entry, case, dtype, "cuda", CUDA)
    noise, other = torch.randn(2048, 2048, device=CUDA), torch.cuda.Stream()
    for _ in range(REPEATS):
        with torch.cuda.stream(other):
            noise @ noise
        numerics.expect_same_bits(entry.name, first, again())


@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16])
def test_a_thousand_steps_follow_the_reference(grad_dtype: torch.dtype) -> None:
    draw = torch.Generator(CUDA).manual_seed(5)
    size = ROWS * WIDTH
    scales = torch.logspace(-3, 3, ROWS, device=CUDA).repeat_interleave(WIDTH)
    param = torch.randn(size, generator=draw, device=CUDA) * scales
    eager = (param, torch.zeros_like(param), torch.zeros_like(param))
    truth = tuple(tensor.double() for tensor in eager)
    ours = tuple(tensor.clone() for tensor in eager)
    weight = torch.empty(size, dtype=torch.bfloat16, device=CUDA)
    for step in range(1, 1001):
        hyper = HYPER | {"lr": HYPER["lr"] * (1 + math.cos(step / 300)) / 2}
        grad = (torch.randn(size, generator=draw, device=CUDA) * scales).to(grad_dtype)
        scale = torch.rand((), generator=draw, device=CUDA)
        shards = [ParameterShard(*ours, grad, weight)]
        adamw(shards, step, Hyper(**hyper), grad_scale=scale, implementation="cuda")
        eager = reference.adamw(*eager, grad, step, **hyper, grad_scale=scale)
        truth = reference.adamw(*truth, grad, step, **hyper, grad_scale=scale)
    assert torch.equal(weight, ours[0].bfloat16())
    for name, *values in zip(("param", "exp_avg", "exp_avg_sq"), ours, eager, truth, strict=True):
        error_rule.check(name, *(value.view(ROWS, WIDTH) for value in values))


def test_amax_of_fp8_weights_is_exact_over_many_blocks() -> None:
    shard = make_shard(3_000_001)
    fp8 = FP8Weight(
        torch.empty(3_000_001, dtype=torch.float8_e4m3fn, device=CUDA),
        torch.full((), 50.0, device=CUDA),
        torch.zeros((), device=CUDA),
    )
    adamw([shard._replace(fp8=fp8)], 1, Hyper(**HYPER), implementation="cuda")
    expected = cast_tensor(shard.param[None], fp8.scale, implementation="cuda")
    assert fp8.amax == shard.param.abs().max() == expected.amax
    expect_equal(fp8.data, expected.rowwise[0])


def test_an_overflow_flag_in_memory_stops_the_update() -> None:
    shard = make_shard(1001)
    before = [tensor.clone() for tensor in shard[:5]]
    for found, changes in ((1.0, False), (0.0, True)):
        flag = torch.full((), found, device=CUDA)
        adamw([shard], 1, Hyper(**HYPER), found_inf=flag, implementation="cuda")
        assert torch.equal(shard.param, before[0]) is not changes
        assert torch.equal(shard.weight, before[4]) is not changes


def test_ops_run_behind_what_the_current_stream_holds() -> None:
    grad, x = torch.zeros(100_000, device=CUDA), torch.zeros(130, 256, device=CUDA)
    param = torch.zeros(100_000, device=CUDA)
    shard = ParameterShard(param, torch.zeros_like(param), torch.zeros_like(param), grad)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(100_000_000)
        grad.fill_(1.0)
        x.fill_(3.0)
        total = square_sum([grad], implementation="cuda")
        adamw([shard], 1, Hyper(lr=0.5), implementation="cuda")
        cast = cast_blocks(x, implementation="cuda")
    side.synchronize()
    assert total == 100_000
    torch.testing.assert_close(param, torch.full_like(param, -0.5), rtol=1e-5, atol=0)
    assert torch.equal(cast.rowwise.float(), torch.full_like(x, 448.0))


def _step(optimizer: FusedAdam, gradients: list[Tensor]) -> Tensor:
    total = square_sum(gradients, implementation="cuda")
    optimizer.update(grad_scale=clip_factor(total, 1.0), found_inf=(~total.isfinite()).float())
    return total


def _optimizer(rate: float | Tensor, capturable: bool) -> tuple[FusedAdam, list[Tensor]]:
    draw = torch.Generator(CUDA).manual_seed(9)
    params = [
        torch.nn.Parameter(torch.randn(n, generator=draw, device=CUDA).bfloat16())
        for n in (5, 70_000, 1024)
    ]
    for param in params:
        param.grad = torch.zeros_like(param)
    options = {"capturable": capturable, "master_weights": True, "implementation": "cuda"}
    return FusedAdam(params, lr=rate, weight_decay=0.1, **options), params


def _set_gradients(params: list[Tensor], step: int) -> None:
    draw = torch.Generator(CUDA).manual_seed(100 + step)
    for param in params:
        gradient = torch.randn(param.shape, generator=draw, device=CUDA)
        param.grad.copy_(gradient.fill_(torch.nan) if step == 3 else gradient)


def test_a_captured_step_replays_on_a_side_stream() -> None:
    rate = torch.full((), 1e-2, dtype=torch.float64, device=CUDA)
    captured, ours = _optimizer(rate, capturable=True)
    plain, theirs = _optimizer(1e-2, capturable=False)
    side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    _set_gradients(ours, 0)
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        _step(captured, [param.grad for param in ours])
    side.synchronize()
    with torch.cuda.graph(graph, stream=side):
        total = _step(captured, [param.grad for param in ours])
    for step in range(6):
        lr = 1e-2 / (step + 1)
        if step:
            _set_gradients(ours, step)
            rate.fill_(lr)
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                graph.replay()
            side.synchronize()
        _set_gradients(theirs, step)
        plain.param_groups[0]["lr"] = lr
        expected = _step(plain, [param.grad for param in theirs])
        if step == 3:
            plain.retract()
        if step:
            expect_equal(total, expected)
        for a, b in zip(ours, theirs, strict=True):
            expect_equal(a.detach(), b.detach())
            for name, state in plain.state[b].items():
                expect_equal(captured.state[a][name], state)
    assert int(captured.param_groups[0]["step"]) == plain.param_groups[0]["step"] == 5


def test_an_update_waits_for_nothing() -> None:
    optimizer, params = _optimizer(1e-2, capturable=False)
    _set_gradients(params, 1)
    gradients = [param.grad for param in params]
    _step(optimizer, gradients)
    torch.cuda.set_sync_debug_mode("error")
    try:
        _step(optimizer, gradients)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_ops_compile_without_a_break() -> None:
    def step(shard: ParameterShard, x: Tensor) -> tuple[Tensor, ...]:
        total = square_sum([shard.grad, x], implementation="cuda")
        scale = clip_factor(total, 1.0)
        adamw([shard], 3, Hyper(**HYPER), grad_scale=scale, implementation="cuda")
        cast = cast_blocks(x, columnwise=True, implementation="cuda")
        return total, shard.param * 2, cast.rowwise.float() + 1, cast.columnwise_inverse * 3

    x = torch.randn(300, 130, generator=torch.Generator(CUDA).manual_seed(1), device=CUDA)
    compiled, plain = make_shard(5000), make_shard(5000)
    found = torch.compile(step, fullgraph=True)(compiled, x)
    for a, b in zip(found, step(plain, x), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
    for a, b in zip(compiled[:3], plain[:3], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_operators_pass_opcheck() -> None:
    ops, checks = torch.ops.phi4, ("test_schema", "test_faketensor", "test_aot_dispatch_static")
    shard = make_shard(100)
    lists = [[tensor] for tensor in shard[:5]] + [[], [], []]
    numbers = (None, None, None, None, 0.1, 0.9, 0.95, 1e-8, 0.1, 1)
    opcheck(ops.adamw_.default, (*lists, *numbers), test_utils=checks)
    opcheck(ops.square_sum.default, ([shard.grad, shard.param],), test_utils=checks)
    x = torch.randn(130, 7, device=CUDA)
    opcheck(ops.fp8_cast.default, (x, None, 1, False, True), test_utils=checks)


def test_over_2_to_the_31_elements() -> None:
    size = 2**31 + 5
    tail = make_shard(5, grad_dtype=torch.bfloat16)
    param, exp_avg, exp_avg_sq = (torch.zeros(size, device=CUDA) for _ in range(3))
    grad, weight = (torch.zeros(size, dtype=torch.bfloat16, device=CUDA) for _ in range(2))
    whole = ParameterShard(param, exp_avg, exp_avg_sq, grad, weight)
    for large, small in zip(whole[:5], tail[:5], strict=True):
        large[-5:] = small
    total = square_sum([grad], implementation="cuda")
    expect_equal(total, square_sum([tail.grad], implementation="cuda"))
    for shard in (whole, tail):
        adamw([shard], 2, Hyper(**HYPER), implementation="cuda")
    for large, small in zip(whole[:5], tail[:5], strict=True):
        expect_equal(large[-5:], small)
        assert int(torch.count_nonzero(large[:-5])) == 0


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU is here; this needs two")
def test_tensors_of_another_device_are_served_there() -> None:
    here, there = make_shard(5000), ParameterShard(*(t.to("cuda:1") for t in make_shard(5000)[:5]))
    assert torch.cuda.current_device() == 0
    for shard in (here, there):
        adamw([shard], 1, Hyper(**HYPER), implementation="cuda")
    totals = [square_sum([shard.grad], implementation="cuda") for shard in (here, there)]
    casts = [
        cast_blocks(shard.param.view(50, 100), implementation="cuda") for shard in (here, there)
    ]
    torch.cuda.synchronize(1)
    assert totals[1].device == casts[1].rowwise.device == torch.device("cuda", 1)
    for a, b in zip((*here[:5], *totals[:1], *casts[0][:2]), (*there[:5], *totals[1:],
                    *casts[1][:2]), strict=True):  # fmt: skip
        expect_equal(a, b)
