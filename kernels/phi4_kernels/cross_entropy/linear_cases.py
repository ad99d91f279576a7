"""Cases of the projection with cross-entropy for tests and benchmarks; see cases."""

import math
from typing import Any

import torch
from torch import Tensor

from phi4_kernels.cross_entropy import linear, reference
from phi4_kernels.cross_entropy.chunks import LinearLayout
from phi4_kernels.cross_entropy.options import LossOptions
from phi4_kernels.reference_arithmetic import widened
from phi4_kernels.registry import CallInputs, Case, Cost, Entry
from phi4_kernels.testing import random_inputs

_ALL_TERMS = {"label_smoothing": 0.1, "z_loss": 1e-4, "weighted": True}


def _case(name: str, tokens: int, hidden: int, vocabulary: int, **more: Any) -> Case:
    strided = more.pop("strided", False)
    sizes = {"tokens": tokens, "hidden": hidden, "vocabulary": vocabulary}
    return Case(name, sizes | more, strided)


# One chunk, several, a short last one, one token each; odd widths, phi-4's vocabulary; peaked
# rows; gaps between rows; all ignored; none.
_PROOF = (
    _case("h24-v1003-strided", 9, 24, 1003, strided=True, chunk=4),
    _case("h7-v64-peaked-one-by-one", 6, 7, 64, peaked=True, chunk=1),
    _case("h32-v520-all-terms", 10, 32, 520, chunk=3, **_ALL_TERMS),
    _case("h8-v100352", 5, 8, 100352),
    _case("all-ignored", 4, 16, 64, chunk=2, ignored=1.0),
    _case("empty", 0, 16, 64),
)
_BENCH = tuple(
    _case(f"t16384-h5120-v100352-c{chunk}", 16384, 5120, 100352, chunk=chunk)
    for chunk in (1024, 4096)
)


def _make(case: Case, dtype: torch.dtype) -> CallInputs:
    """Hidden states at scales from 1e-3 to 10, so that some rows are peaked and none overflows."""
    generator, sizes = case.generator(), case.sizes
    tokens, width, vocabulary = sizes["tokens"], sizes["hidden"], sizes["vocabulary"]
    hidden = random_inputs.rows((tokens, width), dtype, generator, high=10.0, strided=case.strided)
    # Rows of norm about 1: logits have the scale of the hidden state's row.
    weight = torch.randn((vocabulary, width), generator=generator) / math.sqrt(width)
    weight = weight.to(dtype)
    targets = torch.randint(vocabulary, (tokens,), generator=generator)
    if sizes.get("peaked"):
        # Confident targets: a loss near 0 is a difference of almost equal numbers.
        targets[: tokens - 1] = (hidden.float() @ weight.float().t()).argmax(-1)[: tokens - 1]
    options = {key: sizes[key] for key in ("label_smoothing", "z_loss") if key in sizes}
    targets[tokens - round(sizes.get("ignored", 0.2) * tokens) :] = LossOptions().ignore_index
    constants: dict[str, Any] = {"targets": targets, "options": LossOptions(**options)}
    if sizes.get("weighted"):
        constants["weights"] = 2 * torch.rand(tokens, generator=generator)
    constants["chunk"] = sizes.get("chunk", 1024)
    return CallInputs({"hidden": hidden, "weight": weight}, constants)


def _per_token(
    hidden: Tensor, weight: Tensor, targets: Tensor, options: LossOptions, chunk: int, **others: Any
) -> tuple[Tensor, Tensor]:
    layout = LinearLayout(chunk_tokens=chunk)
    return linear.linear_cross_entropy(hidden, weight, targets, options, layout=layout, **others)


def _defined(
    hidden: Tensor, weight: Tensor, targets: Tensor, options: LossOptions, chunk: int, **others: Any
) -> tuple[Tensor, Tensor]:
    return reference.linear_cross_entropy(hidden, weight, targets, options, **others)


def _summed(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    options: LossOptions,
    chunk: int,
    weights: Tensor | None = None,
    implementation: str = "auto",
) -> tuple[Tensor, ...]:
    """The sum of losses and its gradients, the weight's in fp32."""
    leaves = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    main_grad = weight.new_zeros(weight.shape, dtype=torch.float32)
    with torch.enable_grad():
        out = linear.summed_linear_cross_entropy(
            *leaves,
            targets,
            options,
            weights=weights,
            layout=LinearLayout(chunk_tokens=chunk),
            main_grad=main_grad,
            implementation=implementation,
        )
        out.total.backward()
    assert leaves[0].grad is not None
    return out.total.detach(), leaves[0].grad, main_grad


def _summed_defined(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    options: LossOptions,
    chunk: int,
    weights: Tensor | None = None,
) -> tuple[Tensor, ...]:
    leaves = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    with torch.enable_grad():
        total = reference.linear_cross_entropy(*leaves, targets, options, weights=weights)[0].sum()
        total.backward()
    of_hidden, of_weight = leaves[0].grad, leaves[1].grad
    assert of_hidden is not None and of_weight is not None
    return total.detach(), of_hidden, widened(of_weight)


def _cost(case: Case, dtype: torch.dtype, *, products: dict[str, int]) -> dict[str, Cost]:
    """Each product is 2 T H V operations; backward reads and writes what forward reads, and the
    weight's gradient in fp32 in addition."""
    tokens, width = case.sizes["tokens"], case.sizes["hidden"]
    vocabulary, size = case.sizes["vocabulary"], dtype.itemsize
    costs = {}
    for mode, count in products.items():
        passes = 1 if count == 1 else 2
        num_bytes = (passes * tokens + vocabulary) * width * size
        formula = f"({passes} * T + {vocabulary}) * H * {size} B"
        if count > 1:
            num_bytes += vocabulary * width * 8
            formula += f" + {vocabulary} * H * 8 B"
        costs[mode] = Cost(num_bytes, count * 2 * tokens * width * vocabulary, formula)
    return costs


ENTRIES = (
    Entry(
        op="cross_entropy",
        name="linear_cross_entropy",
        function=_per_token,
        reference=_defined,
        make=_make,
        proof_cases=_PROOF,
        shipped_cases=(),
        bench_cases=_BENCH[:1],
        # The bound if logits were computed once; computing them again shows as distance from it.
        cost=lambda case, dtype: _cost(case, dtype, products={"forward": 1, "backward": 2}),
    ),
    Entry(
        op="cross_entropy",
        name="summed_linear_cross_entropy",
        function=_summed,
        reference=_summed_defined,
        make=_make,
        # The same kernels as above: the widest rows need no second proof.
        proof_cases=tuple(case for case in _PROOF if case.sizes["vocabulary"] < 100352),
        shipped_cases=(),
        bench_cases=_BENCH,
        cost=lambda case, dtype: _cost(case, dtype, products={"forward": 3}),
        differentiable=False,
    ),
)
