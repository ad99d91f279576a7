"""Vocab-parallel cross-entropy on one rank, for the tests that start ranks or an interpreter."""

import os
from pathlib import Path

import torch
import torch.distributed as dist
from phi4_kernels.cross_entropy import (
    LinearLayout,
    LossOptions,
    cross_entropy,
    linear_cross_entropy,
    op,
    reference,
)
from phi4_kernels.cross_entropy.op import VocabularyShard
from phi4_kernels.cross_entropy.options import PLAIN
from phi4_kernels.testing import error_rule, random_inputs
from torch._inductor import config as inductor

from tests.support.ranks import gloo_group

TOKENS, VOCABULARY = 15, 1204
OPTIONS = LossOptions(label_smoothing=0.1, z_loss=1e-4)
KINDS = ((torch.bfloat16, False), (torch.float32, True))
"""Dtype, and whether the logits are peaked."""
NAMES = ("losses", "log_probs", "gradient")


def problem(dtype: torch.dtype, peaked: bool) -> dict[str, torch.Tensor]:
    """Logits at scales over six orders of magnitude, a fifth of the tokens ignored."""
    generator = torch.Generator().manual_seed(11)
    logits = random_inputs.rows(
        (TOKENS, VOCABULARY), dtype, generator, high=30.0 if peaked else 1e3
    )
    targets = torch.randint(VOCABULARY, (TOKENS,), generator=generator)
    if peaked:
        targets[::2] = logits.argmax(-1)[::2]
    targets[::5] = OPTIONS.ignore_index
    weights, dlosses, dlog_probs = (torch.rand(TOKENS, generator=generator) for _ in range(3))
    return {
        "logits": logits,
        "targets": targets,
        "weights": weights,
        "dlosses": dlosses,
        "dlog_probs": dlog_probs,
    }


def on_rank(
    rank: int, size: int, dtype: torch.dtype, peaked: bool, implementation: str = "torch"
) -> dict[str, torch.Tensor]:
    """Losses, log-probabilities and this rank's columns of the gradient."""
    given = problem(dtype, peaked)
    shard = given["logits"].chunk(size, dim=1)[rank].contiguous().requires_grad_()
    out = cross_entropy(
        shard * 1,
        given["targets"],
        OPTIONS,
        weights=given["weights"],
        group=dist.group.WORLD if size > 1 else None,
        implementation=implementation,
    )
    torch.autograd.backward(out, (given["dlosses"], given["dlog_probs"]))
    return dict(zip(NAMES, (*(tensor.detach() for tensor in out), shard.grad), strict=True))


def on_gloo_rank(rank: int, size: int) -> list[dict[str, torch.Tensor]]:
    """on_rank for KINDS inside a group of its own, the last kind twice."""
    with gloo_group(rank, size):
        return [on_rank(rank, size, *kind) for kind in (*KINDS, KINDS[-1])]


def interpreted_rank(rank: int, size: int, folder: str) -> None:
    """on_rank by the interpreted kernels; leaves its results in the folder."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    store = dist.FileStore(f"{folder}/store", size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    results = on_rank(rank, size, torch.bfloat16, False, "triton")
    torch.save(results, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


def expect_right(ranks: list[dict[str, torch.Tensor]], dtype: torch.dtype, peaked: bool) -> None:
    """All ranks hold the same losses, and the whole obeys the error rule."""
    for other in ranks[1:]:
        for name in NAMES[:2]:
            assert torch.equal(other[name], ranks[0][name])
    ours = ranks[0] | {"gradient": torch.cat([rank["gradient"] for rank in ranks], dim=1)}
    given = problem(dtype, peaked)
    eager, truth = (_defined(given, kind) for kind in (dtype, torch.float64))
    for name in NAMES:
        error_rule.check(f"{len(ranks)} ranks {name}", ours[name], eager[name], truth[name])


def _defined(given: dict[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    logits = given["logits"].detach().to(dtype).requires_grad_()
    weights = given["weights"].to(wide)
    out = reference.cross_entropy(logits, given["targets"], OPTIONS, weights=weights)
    torch.autograd.backward(out, (given["dlosses"].to(wide), given["dlog_probs"].to(wide)))
    return dict(zip(NAMES, (*(tensor.detach() for tensor in out), logits.grad), strict=True))


def one_graph(implementation: str) -> None:
    """torch.compile traces loss and gradient without a break, with the bits of eager."""

    def loss(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        out = cross_entropy(hidden @ weight, targets, OPTIONS, implementation=implementation)
        return out.losses.sum() + out.log_probs.square().sum()

    results = []
    for run in (loss, torch.compile(loss, backend="aot_eager", fullgraph=True)):
        generator = torch.Generator().manual_seed(3)
        hidden = torch.randn(6, 8, generator=generator).requires_grad_()
        weight = torch.randn(8, 40, generator=generator).requires_grad_()
        targets = torch.tensor([0, 39, -100, 7, 7, 20])
        total = run(hidden, weight, targets)
        results.append([total.detach(), *torch.autograd.grad(total, (hidden, weight))])
    for first, second in zip(*results, strict=True):
        torch.testing.assert_close(first, second)


def padded_rows_compile(implementation: str) -> None:
    """Inductor leaves gaps between long rows on a GPU; made to do so on a CPU, gradients hold."""
    layout = LinearLayout(chunk_tokens=4)

    def whole(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        out = cross_entropy(hidden @ weight.t(), targets, OPTIONS, implementation=implementation)
        return out.losses.sum()

    def chunked(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        named = {"layout": layout, "implementation": implementation}
        return linear_cross_entropy(hidden, weight, targets, OPTIONS, **named).losses.sum()

    hidden, weight = torch.randn(6, 8).requires_grad_(), torch.randn(1032, 8).requires_grad_()
    targets = torch.tensor([0, 1031, -100, 7, 7, 20])
    for loss in (whole, chunked):
        with inductor.patch(disable_padding_cpu=False, force_disable_caches=True):
            total = torch.compile(loss, fullgraph=True)(hidden, weight, targets)
            ours = torch.autograd.grad(total, (hidden, weight))
        expected = torch.autograd.grad(loss(hidden, weight, targets), (hidden, weight))
        for one, other in zip(ours, expected, strict=True):
            torch.testing.assert_close(one, other)


def one_launch_has_the_bits_of_two(implementation: str) -> None:
    """Where there is nothing to exchange, a kernel gives what two give with an exchange between."""
    for dtype, peaked in KINDS:
        given = problem(dtype, peaked)
        logits, targets, scales = (given[name] for name in ("logits", "targets", "weights"))
        targets[1] = VOCABULARY
        for options in (PLAIN, OPTIONS):
            common = (options, VocabularyShard.of(None, VOCABULARY), implementation)
            statistics = op.run_statistics(logits, targets, *common)
            two = op.run_combine(statistics, targets, scales, *common)
            one = op.run_forward(logits, targets, scales, *common)
            for first, second in zip(one, two, strict=True):
                assert first.view(torch.int32).equal(second.view(torch.int32))


def ignored_rows_are_not_read(implementation: str) -> None:
    """NaN in a row that is ignored reaches neither losses nor gradient."""
    logits = torch.randn(3, 20)
    logits[1] = torch.nan
    targets = torch.tensor([3, -100, 19])
    activation = logits.requires_grad_() * 1
    out = cross_entropy(activation, targets, OPTIONS, implementation=implementation)
    out.losses.sum().backward()
    assert out.losses[1] == 0 and out.log_probs[1] == 0 and not logits.grad[1].any()
    assert out.losses.isfinite().all() and logits.grad.isfinite().all() and logits.grad[0].any()


def a_foreign_target_gives_nan(implementation: str) -> None:
    """An id outside the vocabulary must not pass for a token that no rank holds."""
    targets = torch.tensor([3, 20, -1])
    out = cross_entropy(torch.randn(3, 20), targets, implementation=implementation)
    assert out.losses.isnan().tolist() == [False, True, True]


def masked_columns_get_nothing(implementation: str) -> None:
    """Columns of -inf, even a whole row's shard of them, have probability and gradient 0."""
    logits = torch.randn(2, 4096 + 40)
    logits[:, 4096:] = -torch.inf
    activation = logits.requires_grad_() * 1
    targets = torch.tensor([0, 4095])
    out = cross_entropy(activation, targets, implementation=implementation)
    out.losses.sum().backward()
    expected = -logits.detach().log_softmax(-1)[range(2), targets]
    torch.testing.assert_close(out.losses, expected)
    assert not logits.grad[:, 4096:].any() and logits.grad[:, :4096].isfinite().all()
