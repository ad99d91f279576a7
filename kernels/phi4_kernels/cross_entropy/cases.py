"""Cases of cross-entropy for tests, resource gate and benchmarks."""

from typing import Any

import torch
from torch import Tensor

from phi4_kernels.cross_entropy import linear_cases, op, reference
from phi4_kernels.cross_entropy.op import VocabularyShard
from phi4_kernels.cross_entropy.options import LossOptions
from phi4_kernels.registry import CallInputs, Case, Cost, Entry
from phi4_kernels.testing import random_inputs

_ALL_TERMS = {"label_smoothing": 0.1, "z_loss": 1e-4, "weighted": True}


def _case(name: str, tokens: int, vocabulary: int, **more: Any) -> Case:
    strided = more.pop("strided", False)
    return Case(name, {"tokens": tokens, "vocabulary": vocabulary} | more, strided)


# Widths below a pack, odd, with and without a tail of a block, at the ladder's step, and phi-4's;
# every term of the loss alone and together; peaked rows; all ignored; no token and one token.
_PROOF = (
    _case("v5", 9, 5),
    _case("v1003-strided", 7, 1003, strided=True),
    _case("v1024-peaked", 6, 1024, peaked=True),
    _case("v2500-smoothed", 6, 2500, label_smoothing=0.1),
    _case("v2500-z-loss", 6, 2500, z_loss=1e-4),
    _case("v8200-all-terms", 5, 8200, **_ALL_TERMS),
    _case("v100352", 5, 100352, ignore_index=100349),
    _case("all-ignored", 4, 64, ignored=1.0),
    _case("empty", 0, 64),
    _case("one-token", 1, 640, ignored=0.0),
)
_SHARDED_PROOF = (
    _case("p2-v2006", 7, 2006, ranks=2),
    _case("p2-v128-strided", 6, 128, ranks=2, strided=True, **_ALL_TERMS),
    _case("p4-v4012-all-terms", 7, 4012, ranks=4, **_ALL_TERMS),
    _case("p4-v100352-peaked", 5, 100352, ranks=4, peaked=True),
    _case("p8-one-column-each", 5, 8, ranks=8),
)
_SHIPPED = (
    _case("v100352", 4, 100352),
    _case("v12544-all-terms", 4, 12544, **_ALL_TERMS),
    _case("v4096", 4, 4096),
)
# Of several ranks: one rank's launch is another kernel's.
_SHARDED_SHIPPED = (
    _case("p8-v100352-all-terms", 4, 100352, ranks=8, **_ALL_TERMS),
    _case("p2-v8192", 4, 8192, ranks=2),
)
_BENCH = tuple(_case(f"t{tokens}-v100352", tokens, 100352) for tokens in (4096, 16384))


def _options(case: Case) -> LossOptions:
    keys = ("ignore_index", "label_smoothing", "z_loss")
    return LossOptions(**{key: case.sizes[key] for key in keys if key in case.sizes})


def _targets(case: Case, logits: Tensor, generator: torch.Generator) -> Tensor:
    """Random ids, or in peaked cases mostly the largest logit; a fifth of them is ignored."""
    tokens, vocabulary = case.sizes["tokens"], case.sizes["vocabulary"]
    targets = torch.randint(vocabulary, (tokens,), generator=generator)
    if case.sizes.get("peaked") and tokens:
        targets[: tokens - 1] = logits.argmax(-1)[: tokens - 1]
    num_ignored = round(case.sizes.get("ignored", 0.2) * tokens)
    targets[tokens - num_ignored :] = _options(case).ignore_index
    return targets


def _make(case: Case, dtype: torch.dtype) -> CallInputs:
    generator = case.generator()
    shape = (case.sizes["tokens"], case.sizes["vocabulary"])
    # Peaked: at 1e3 nothing but the largest logit would have a probability above 0.
    high = 30.0 if case.sizes.get("peaked") else 1e3
    logits = random_inputs.rows(shape, dtype, generator, high=high, strided=case.strided)
    constants: dict[str, Any] = {
        "targets": _targets(case, logits, generator),
        "options": _options(case),
    }
    if case.sizes.get("weighted"):
        constants["weights"] = 2 * torch.rand(shape[0], generator=generator)
    return CallInputs({"logits": logits}, constants)


def _copied(logits: Tensor) -> Tensor:
    copy = torch.empty_strided(
        logits.shape, logits.stride(), dtype=logits.dtype, device=logits.device
    )
    return copy.copy_(logits)


def _on_a_copy(logits: Tensor, targets: Tensor, options: LossOptions, **others: Any) -> Any:
    """The op on a copy with the same strides: it overwrites an activation, never a leaf."""
    return op.cross_entropy(_copied(logits), targets, options, **others)


def _make_sharded(case: Case, dtype: torch.dtype) -> CallInputs:
    inputs, generator = _make(case, dtype), case.generator()
    tokens, high = case.sizes["tokens"], random_inputs.gradient_high(dtype)
    incoming = {
        name: random_inputs.rows((tokens, 1), torch.float32, generator, high=high).squeeze(1)
        for name in ("dlosses", "dlog_probs")
    }
    more = {"num_ranks": case.sizes.get("ranks", 1), **incoming}
    return CallInputs(inputs.tensors, inputs.constants | more)


def _shards_in_place(
    logits: Tensor,
    targets: Tensor,
    options: LossOptions,
    num_ranks: int,
    dlosses: Tensor,
    dlog_probs: Tensor,
    weights: Tensor | None = None,
    implementation: str = "auto",
) -> tuple[Tensor, ...]:
    """Forward and backward of all tensor ranks one after the other; the all-gather is emulated."""
    name = op.dispatch.resolve("cross_entropy", implementation, logits.device)
    vocabulary, width = logits.shape[1], logits.shape[1] // num_ranks
    shards = [
        VocabularyShard(None, num_ranks, rank * width, vocabulary) for rank in range(num_ranks)
    ]
    pairs = list(zip(logits.split(width, dim=1), shards, strict=True))
    # The result of an all-gather over the ranks.
    gathered = [op.run_statistics(part, targets, options, mine, name) for part, mine in pairs]
    losses, log_probs, normalizer = op.run_combine(
        torch.cat(gathered), targets, weights, options, shards[0], name
    )
    for part, mine in pairs:
        incoming = (dlosses, dlog_probs)
        op.run_backward(part, targets, weights, normalizer, incoming, options, mine, name)
    return losses, log_probs, logits


def _sharded(logits: Tensor, *args: Any, **others: Any) -> tuple[Tensor, ...]:
    """As _shards_in_place, on a copy."""
    return _shards_in_place(_copied(logits), *args, **others)


def _whole(
    logits: Tensor,
    targets: Tensor,
    options: LossOptions,
    num_ranks: int,
    dlosses: Tensor,
    dlog_probs: Tensor,
    weights: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Expected result of _shards_in_place: the reference and its gradient on one rank."""
    leaf = logits.detach().requires_grad_()
    outputs = reference.cross_entropy(leaf, targets, options, weights=weights)
    torch.autograd.backward(outputs, (dlosses, dlog_probs))
    assert leaf.grad is not None
    return (*(output.detach() for output in outputs), leaf.grad)


def _cost(case: Case, dtype: torch.dtype, *, passes: int) -> dict[str, Cost]:
    elements = case.sizes["tokens"] * case.sizes["vocabulary"]
    formula = f"{passes} * T * {case.sizes['vocabulary']} * {dtype.itemsize} B"
    # exp, subtraction, sum and maximum per logit; bytes decide by far.
    flops = 4 * passes * elements
    return {"forward": Cost(passes * elements * dtype.itemsize, flops, formula)}


ENTRIES = (
    Entry(
        op="cross_entropy",
        name="cross_entropy",
        function=_on_a_copy,
        timed=op.cross_entropy,
        reference=reference.cross_entropy,
        make=_make,
        proof_cases=_PROOF,
        shipped_cases=_SHIPPED,
        bench_cases=_BENCH,
        cost=lambda case, dtype: _cost(case, dtype, passes=1),
    ),
    Entry(
        op="cross_entropy",
        name="cross_entropy_sharded",
        function=_sharded,
        timed=_shards_in_place,
        reference=_whole,
        make=_make_sharded,
        proof_cases=_SHARDED_PROOF,
        shipped_cases=_SHARDED_SHIPPED,
        bench_cases=_BENCH[-1:],
        cost=lambda case, dtype: _cost(case, dtype, passes=3),
        differentiable=False,
    ),
    *linear_cases.ENTRIES,
)
