"""Attention in Triton on a GPU: lengths to 16,384, equal bits under load, graphs. `make gpu`."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from phi4_kernels.attention import Ranges, attention, reference
from phi4_kernels.testing.error_rule import ulp
from torch import Tensor

pytestmark = pytest.mark.gpu

REPEATS = 1000
PHI4 = (40, 10, 128)


def drawn(tokens: int, heads: tuple[int, int, int], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """q, k, v and a gradient of out."""
    num_heads, groups, dim = heads
    generator = torch.Generator("cuda").manual_seed(tokens)
    return tuple(
        torch.randn(tokens, n, dim, generator=generator, device="cuda").to(dtype)
        for n in (num_heads, groups, groups, num_heads)
    )


def packed(lengths: list[int]) -> Ranges:
    cu_seqlens = torch.tensor([0, *lengths], device="cuda").cumsum(0).to(torch.int32)
    return Ranges.packed(cu_seqlens, max(lengths))


def run(
    inputs: tuple[Tensor, ...], ranges: Ranges, implementation: str = "triton"
) -> tuple[Tensor, ...]:
    """out, lse, dq, dk, dv."""
    *leaves, dout = (x.detach().requires_grad_() for x in inputs)
    out, lse = attention(*leaves, ranges, implementation=implementation)
    return out.detach(), lse, *torch.autograd.grad(out, leaves, dout)


def defined(inputs: tuple[Tensor, ...], ranges: Ranges) -> tuple[Tensor, ...]:
    """The same by the definition."""
    q, k, v, dout = inputs
    options: dict[str, Any] = {"causal": True, "scale": q.shape[2] ** -0.5}
    out, lse = reference.attention_forward(q, k, v, ranges, **options)
    return out, lse, *reference.attention_backward(dout, q, k, v, out, lse, ranges, **options)


def expect_right(ours: tuple[Tensor, ...], inputs: tuple[Tensor, ...], ranges: Ranges) -> None:
    """Largest error at most twice eager's and 1 ulp, for every output and gradient."""
    eager = defined(inputs, ranges)
    truth = defined(tuple(x.double() for x in inputs), ranges)
    names = ("out", "lse", "dq", "dk", "dv")
    for name, mine, plain, exact in zip(names, ours, eager, truth, strict=True):
        bound = 2 * (plain - exact).abs().max() + ulp(exact.abs().max(), mine.dtype)
        assert (mine - exact).abs().max() <= bound, name


@pytest.mark.parametrize("implementation", ["triton", "torch"])
@pytest.mark.parametrize(
    "lengths",
    [[16384], [1, 8190, 4097, 4096], [1] * 2048 + [2048], [129, 127, 1, 3000, 64, 511, 512, 513]],
    ids=["dense", "long", "ones", "mixed"],
)
def test_long_rows_obey_the_rule(lengths: list[int], implementation: str) -> None:
    ranges, inputs = packed(lengths), drawn(sum(lengths), (4, 1, 128), torch.bfloat16)
    expect_right(run(inputs, ranges, implementation), inputs, ranges)


@pytest.mark.parametrize("dim", [64, 96, 128])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_other_sizes_obey_the_rule(dim: int, dtype: torch.dtype) -> None:
    ranges, inputs = packed([700, 5, 1043]), drawn(1748, (8, 8, dim), dtype)
    expect_right(run(inputs, ranges), inputs, ranges)


def test_a_cache_of_16384_keys_is_read_right() -> None:
    q, *_ = drawn(3, PHI4, torch.bfloat16)
    _, k, v, _ = drawn(20000, PHI4, torch.bfloat16)
    ranges = Ranges.of([0, 1, 3], [7, 17000], [16391, 20000], "cuda")
    out, lse = attention(q, k, v, ranges, implementation="triton")
    options: dict[str, Any] = {"causal": True, "scale": 128**-0.5}
    exact, exact_lse = reference.attention_forward(
        q.double(), k.double(), v.double(), ranges, **options
    )
    plain, _ = reference.attention_forward(q, k, v, ranges, **options)
    bound = 2 * (plain - exact).abs().max() + ulp(exact.abs().max(), q.dtype)
    assert (out - exact).abs().max() <= bound
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-5, atol=1e-5)


def test_a_thousand_runs_agree_in_every_bit_under_load() -> None:
    ranges, inputs = packed([1500, 1, 500, 47]), drawn(2048, PHI4, torch.bfloat16)
    first = run(inputs, ranges)
    noise, other = torch.randn(2048, 2048, device="cuda"), torch.cuda.Stream()
    differs = torch.zeros((), dtype=torch.bool, device="cuda")
    for _ in range(REPEATS):
        with torch.cuda.stream(other):
            noise @ noise
        for one, two in zip(first, run(inputs, ranges), strict=True):
            differs |= (one != two).any()
    assert not differs


def test_a_captured_graph_replays_other_documents() -> None:
    inputs = drawn(1024, PHI4, torch.bfloat16)
    cu_seqlens = torch.tensor([0, 300, 1024], dtype=torch.int32, device="cuda")
    ranges = Ranges.packed(cu_seqlens, 1024)
    for _ in range(2):
        run(inputs, ranges)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(inputs, ranges)
    cu_seqlens.copy_(torch.tensor([0, 601, 1024], dtype=torch.int32))
    graph.replay()
    for one, two in zip(captured, run(inputs, ranges), strict=True):
        assert torch.equal(one, two)


def test_torch_compile_holds_it_in_one_graph() -> None:
    ranges, inputs = packed([100, 156]), drawn(256, PHI4, torch.bfloat16)
    *leaves, dout = (x.detach().requires_grad_() for x in inputs)

    def block(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> Tensor:
        return attention(q, k, v, Ranges.packed(cu_seqlens, 156), implementation="triton").out

    def results(function: Callable[..., Tensor]) -> list[Tensor]:
        out = function(*leaves, ranges.q_offsets)
        return [out.detach(), *torch.autograd.grad(out, leaves, dout)]

    whole = torch.compile(block, fullgraph=True)
    for one, two in zip(results(block), results(whole), strict=True):
        assert torch.equal(one, two)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_tensors_on_another_than_the_current_device() -> None:
    ranges, inputs = packed([100, 156]), drawn(256, PHI4, torch.bfloat16)
    parts = (ranges.q_offsets, ranges.k_starts, ranges.k_ends)
    moved = Ranges(*(part.to("cuda:1") for part in parts), 156, 156)
    there = run(tuple(x.to("cuda:1") for x in inputs), moved)
    for one, two in zip(run(inputs, ranges), there, strict=True):
        assert two.device.index == 1 and torch.equal(one, two.to("cuda:0"))
