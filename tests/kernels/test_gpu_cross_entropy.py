"""Cross-entropy where only a GPU tells: graphs, streams, compile, devices, bytes. `make gpu`."""

from collections.abc import Callable

import pytest
import torch
from phi4_kernels.cross_entropy import (
    LinearLayout,
    LossOptions,
    cross_entropy,
    linear_cross_entropy,
    summed_linear_cross_entropy,
)

pytestmark = pytest.mark.gpu

TOKENS, WIDTH, VOCABULARY = 96, 256, 4104
OPTIONS = LossOptions(label_smoothing=0.1, z_loss=1e-4)
NAMED = {"implementation": "triton"}
LAYOUT = LinearLayout(chunk_tokens=40)
Tensors = tuple[torch.Tensor, ...]


def plain(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> Tensors:
    """Loss and gradients through all logits."""
    out = cross_entropy(hidden @ weight.t(), targets, OPTIONS, **NAMED)
    loss = out.losses.sum() + out.log_probs.square().sum()
    return loss, *torch.autograd.grad(loss, (hidden, weight))


def per_token(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> Tensors:
    """Through chunks of logits, computed again."""
    out = linear_cross_entropy(hidden, weight, targets, OPTIONS, layout=LAYOUT, **NAMED)
    loss = out.losses.sum() + out.log_probs.square().sum()
    return loss, *torch.autograd.grad(loss, (hidden, weight))


def summed(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> Tensors:
    """Through chunks of logits, once."""
    out = summed_linear_cross_entropy(hidden, weight, targets, OPTIONS, layout=LAYOUT, **NAMED)
    return out.total, *torch.autograd.grad(out.total, (hidden, weight))


def into_main_grad(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> Tensors:
    """The same with a buffer for the weight's gradient."""
    main_grad = torch.zeros(weight.shape, device=weight.device)
    more = {"layout": LAYOUT, "main_grad": main_grad, **NAMED}
    total = summed_linear_cross_entropy(hidden, weight, targets, OPTIONS, **more).total
    return total, *torch.autograd.grad(total, hidden), main_grad


FORMS = (plain, per_token, summed, into_main_grad)


def drawn(seed: int, device: str = "cuda") -> Tensors:
    generator = torch.Generator(device).manual_seed(seed)
    half = {"device": device, "generator": generator, "dtype": torch.bfloat16}
    hidden = torch.randn(TOKENS, WIDTH, **half)
    weight = torch.randn(VOCABULARY, WIDTH, **half) / 16
    targets = torch.randint(VOCABULARY, (TOKENS,), device=device, generator=generator)
    targets[::5] = OPTIONS.ignore_index
    return hidden.requires_grad_(), weight.requires_grad_(), targets


def detached(results: Tensors) -> Tensors:
    return tuple(tensor.detach().clone() for tensor in results)


@pytest.mark.parametrize("form", FORMS)
def test_a_graph_replays_on_a_side_stream_with_new_inputs(form: Callable[..., Tensors]) -> None:
    inputs, stream = drawn(1), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            form(*inputs)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        results = form(*inputs)
    for seed in (2, 3):
        fresh = drawn(seed)
        expected = detached(form(*fresh))
        with torch.no_grad():
            for old, new in zip(inputs, fresh, strict=True):
                old.copy_(new)
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            graph.replay()
        torch.cuda.synchronize()
        assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


LOSSES = {
    "plain": lambda h, w, t: cross_entropy(h @ w.t(), t, OPTIONS, **NAMED).losses.sum(),
    "per token": lambda h, w, t: linear_cross_entropy(
        h, w, t, OPTIONS, layout=LAYOUT, **NAMED
    ).losses.sum(),
    "summed": lambda h, w, t: (
        summed_linear_cross_entropy(h, w, t, OPTIONS, layout=LAYOUT, **NAMED).total
    ),
}


@pytest.mark.parametrize("form", LOSSES)
def test_compile_makes_one_graph_with_the_results_of_eager(form: str) -> None:
    inputs, whole = drawn(4), torch.compile(LOSSES[form], fullgraph=True)
    results = []
    for run in (LOSSES[form], whole):
        loss = run(*inputs)
        results.append((loss.detach(), *torch.autograd.grad(loss, inputs[:2])))
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager)


@pytest.mark.skipif("torch.cuda.device_count() < 2", reason="needs a second GPU")
@pytest.mark.parametrize("form", FORMS)
def test_a_device_that_is_not_current_gives_the_same(form: Callable[..., Tensors]) -> None:
    first = drawn(5, "cuda:0")
    second = [tensor.detach().to("cuda:1") for tensor in first]
    second[:2] = [tensor.requires_grad_() for tensor in second[:2]]
    with torch.cuda.device(0):
        results = [detached(form(*first)), detached(form(*second))]
    for here, there in zip(*results, strict=True):
        assert there.device.index == 1 and torch.equal(here.cpu(), there.cpu())


@pytest.mark.parametrize("form", ["summed", "into main_grad", "per token"])
def test_memory_at_16384_tokens_is_one_chunk_and_the_gradients(form: str) -> None:
    tokens, width, vocabulary = 16384, 5120, 100352
    half = {"device": "cuda", "dtype": torch.bfloat16}
    hidden = torch.randn(tokens, width, **half).requires_grad_()
    weight = (torch.randn(vocabulary, width, **half) / 70).requires_grad_()
    targets = torch.randint(vocabulary, (tokens,), device="cuda")
    function = linear_cross_entropy if form == "per token" else summed_linear_cross_entropy
    # A first product allocates the workspace of the matrix library, which stays.
    function(hidden[:64], weight, targets[:64], **NAMED)[0].sum().backward()
    hidden.grad = weight.grad = None
    fp32 = {"device": "cuda", "dtype": torch.float32}
    before = torch.cuda.memory_allocated() - hidden.nbytes
    main_grad = torch.zeros(weight.shape, **fp32) if form == "into main_grad" else None
    torch.cuda.reset_peak_memory_stats()
    out = function(hidden, weight, targets, main_grad=main_grad, **NAMED)
    out[0].sum().backward()
    peak = torch.cuda.max_memory_allocated() - before
    needed = 2 * hidden.nbytes + weight.numel() * 4 + 1024 * vocabulary * 2
    assert 0.9 < peak / needed <= 1.2


def test_more_than_2_to_the_31_logits_are_right() -> None:
    vocabulary = 100352
    tokens = 2**31 // vocabulary + 3
    logits = torch.randn(tokens, vocabulary, device="cuda", dtype=torch.bfloat16).requires_grad_()
    targets = torch.randint(vocabulary, (tokens,), device="cuda")
    few = logits[-3:].detach().clone().requires_grad_()
    results = []
    for leaf, ids in ((logits, targets), (few, targets[-3:])):
        out = cross_entropy(leaf * 1, ids, **NAMED)
        out.losses.sum().backward()
        results.append((out.losses[-3:].detach(), leaf.grad[-3:]))
    for many, last in zip(*results, strict=True):
        assert torch.equal(many, last)
