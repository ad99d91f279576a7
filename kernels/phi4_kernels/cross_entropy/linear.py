"""The output projection and its cross-entropy as one op: logits exist a few tokens at a time.

A chunk is one product to logits [chunk, V / P], on which the steps of `op` run, loss and gradient
in place. Two functions, because a chunk's logits are gone when an incoming gradient arrives:

* `linear_cross_entropy` differentiates per-token losses and log-probabilities, whatever gradient
  they get: backward computes the logits again (8 T H V / P operations instead of 6).
* `summed_linear_cross_entropy` differentiates only the sum of the weighted losses. Its gradient is
  known up to one factor, so forward makes all of it (6 T H V / P).
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from phi4_kernels import dispatch
from phi4_kernels.autograd import once_differentiable, without_autocast
from phi4_kernels.checks import (
    FLOAT_DTYPES,
    expect_dtype,
    expect_rows_in_place,
    expect_same_device,
    expect_shape,
    rows_of,
)
from phi4_kernels.cross_entropy import chunks
from phi4_kernels.cross_entropy.chunks import Gradients, Head, LinearLayout, Tokens
from phi4_kernels.cross_entropy.fp32_products import narrowed_in_place
from phi4_kernels.cross_entropy.op import (
    CrossEntropy,
    VocabularyShard,
    check_tokens,
    check_values,
    flat,
)
from phi4_kernels.cross_entropy.options import PLAIN, LossOptions
from phi4_kernels.errors import KernelError, ShapeError

_OP = "linear_cross_entropy"
ONE_RANK = LinearLayout()


class LossSum(NamedTuple):
    """Result of `summed_linear_cross_entropy`; only the total is differentiable."""

    total: Tensor
    """[], fp32: the sum of losses."""
    losses: Tensor
    """Per token; see CrossEntropy."""
    log_probs: Tensor


@without_autocast
def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    options: LossOptions = PLAIN,
    *,
    weights: Tensor | None = None,
    layout: LinearLayout = ONE_RANK,
    main_grad: Tensor | None = None,
    implementation: str = "auto",
) -> CrossEntropy:
    """Loss and log-probability of every token under logits hidden @ weight.T.

    Both outputs take any incoming gradient; backward computes the logits again. Without autograd,
    as for a reference model's log-probabilities, nothing is saved for backward.

    Args:
        hidden: [..., H], bf16, fp16 or fp32; with sequence_parallel [S / P, ..., H].
        weight: [V / P, H], this rank's rows, of the same dtype.
        targets: hidden's shape without H (with sequence_parallel [S, ...]); see cross_entropy.
        options, weights: see cross_entropy.
        layout: ranks, and tokens of a chunk.
        main_grad: [V / P, H], fp32; backward adds the gradient of weight to it, and autograd gets
            none. Without it the sum over chunks is fp32 too, rounded once to weight's dtype.
        implementation: see dispatch.choose.

    Raises:
        DtypeError, ShapeError, DeviceError, ImplementationError: see errors.
        KernelError, TargetError: as cross_entropy.

    Collectives: those of cross_entropy. With sequence_parallel, forward and backward all-gather
        hidden (its bytes * P per rank), backward reduce-scatters its gradient in fp32; else
        backward all-reduces it (4 T H bytes). All of them chunk by chunk.
    Source: as cross_entropy; chunks as in Liger-Kernel (Hsu et al. 2024), section 3.3.
    """
    head, rows, tokens = _prepared(
        hidden, weight, targets, options, weights, layout, main_grad, implementation
    )
    losses, log_probs = _PerToken.apply(rows, weight, main_grad, *tokens, *head[1:])
    return CrossEntropy(losses.view(targets.shape), log_probs.view(targets.shape))


@without_autocast
def summed_linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    options: LossOptions = PLAIN,
    *,
    weights: Tensor | None = None,
    layout: LinearLayout = ONE_RANK,
    main_grad: Tensor | None = None,
    implementation: str = "auto",
) -> LossSum:
    """Sum of the losses under logits hidden @ weight.T; forward also computes its gradients.

    For a mean, pass weights of 1 / N: a factor on the total is exact in fp32 but rounds once more
    in half precision.

    Args:
        hidden, weight, targets, options, weights, layout, implementation: see linear_cross_entropy.
        main_grad: [V / P, H], fp32; forward adds the gradient of weight to it, for a total whose
            own gradient is 1. Any other value makes the gradient of hidden NaN.

    Returns:
        total, losses, log_probs; without autograd no gradient is made.

    Raises:
        As linear_cross_entropy; KernelError in backward when it ran before, or under
            PHI4_KERNELS_DEBUG=1 with main_grad when the total's gradient is not 1.

    Collectives: those of linear_cross_entropy, all in forward, hidden gathered once.
    Source: as linear_cross_entropy.
    """
    head, rows, tokens = _prepared(
        hidden, weight, targets, options, weights, layout, main_grad, implementation
    )
    enabled = torch.is_grad_enabled()
    wanted = (enabled and hidden.requires_grad, enabled and weight.requires_grad)
    total, losses, log_probs = _Summed.apply(rows, weight, main_grad, wanted, *tokens, *head[1:])
    return LossSum(total, losses.view(targets.shape), log_probs.view(targets.shape))


def _prepared(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    options: LossOptions,
    weights: Tensor | None,
    layout: LinearLayout,
    main_grad: Tensor | None,
    implementation: str,
) -> tuple[Head, Tensor, Tokens]:
    """Checked arguments, tokens flat."""
    expect_dtype(_OP, "hidden", hidden, FLOAT_DTYPES)
    if hidden.dim() < 2 or weight.dim() != 2 or 0 in weight.shape:
        raise ShapeError(
            f"{_OP}: hidden has shape {tuple(hidden.shape)}, weight {tuple(weight.shape)}; "
            "expected [..., H] and [V / P, H]; pass one row per token and one per id"
        )
    expect_dtype(_OP, "weight", weight, (hidden.dtype,))
    expect_shape(_OP, "weight", weight, (weight.shape[0], hidden.shape[-1]), "one width for both")
    if main_grad is not None:
        expect_dtype(_OP, "main_grad", main_grad, (torch.float32,))
        expect_shape(_OP, "main_grad", main_grad, tuple(weight.shape), "pass weight's own buffer")
        expect_rows_in_place(_OP, "main_grad", main_grad, 1)
    shard = VocabularyShard.of(layout.group, weight.shape[0])
    outer, *inner = hidden.shape[:-1]
    shape = (outer * (shard.size if layout.sequence_parallel else 1), *inner)
    check_tokens(_OP, hidden, shape, targets, weights)
    expect_same_device(_OP, hidden=hidden, weight=weight, main_grad=main_grad)
    if dispatch.debug():
        check_values(targets, options, shard)
    name = dispatch.resolve("cross_entropy", implementation, hidden.device)
    head = Head(weight, options, shard, layout, name)
    return head, rows_of(hidden), Tokens(flat(targets), flat(weights))


class _PerToken(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        weight: Tensor,
        main_grad: Tensor | None,
        ids: Tensor,
        scales: Tensor | None,
        *head: Any,
    ) -> tuple[Tensor, Tensor]:
        tokens = Tokens(ids, scales)
        # Kept: 3 numbers per token, from which backward makes p again. The logits are not.
        losses, log_probs, normalizer = chunks.forward(Head(weight, *head), rows, tokens)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(rows, weight, ids, scales, normalizer)
        ctx.head, ctx.main_grad = head, main_grad
        return losses, log_probs

    @staticmethod
    @once_differentiable(_OP)
    def backward(
        ctx: Any, dlosses: Tensor | None, dlog_probs: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        none = (None,) * (3 + len(ctx.head))
        if dlosses is None and dlog_probs is None:
            return None, None, *none
        rows, weight, ids, scales, normalizer = ctx.saved_tensors
        head, wanted = Head(weight, *ctx.head), ctx.needs_input_grad[:2]
        gradients = Gradients(rows, weight, wanted, ctx.main_grad)
        saved = (normalizer, flat(dlosses), flat(dlog_probs))
        chunks.backward(head, rows, Tokens(ids, scales), saved, gradients)
        own = None if ctx.main_grad is not None else gradients.weight
        return gradients.hidden, narrowed_in_place(own, weight.dtype), *none


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        weight: Tensor,
        main_grad: Tensor | None,
        wanted: tuple[bool, bool],
        ids: Tensor,
        scales: Tensor | None,
        *head: Any,
    ) -> tuple[Tensor, Tensor, Tensor]:
        # d total / d loss = 1 is known already, so gradients are made while a chunk's logits exist.
        gradients = Gradients(rows, weight, wanted, main_grad) if any(wanted) else None
        whole, tokens = Head(weight, *head), Tokens(ids, scales)
        losses, log_probs, _ = chunks.forward(whole, rows, tokens, gradients)
        ctx.mark_non_differentiable(losses, log_probs)
        if gradients is not None:
            own = None if main_grad is not None else gradients.weight
            ctx.save_for_backward(gradients.hidden, own)
        ctx.has_main_grad = main_grad is not None
        ctx.dtype, ctx.num_others, ctx.overwritten = weight.dtype, 4 + len(head), False
        # In fp64: a sum of many losses loses digits in fp32.
        return losses.sum(dtype=torch.float64).float(), losses, log_probs

    @staticmethod
    @once_differentiable(_OP)
    def backward(
        ctx: Any, dtotal: Tensor, dlosses: None, dlog_probs: None
    ) -> tuple[Tensor | None, ...]:
        if ctx.overwritten:
            raise KernelError(
                f"{_OP}: backward ran before; expected once, because the gradients are scaled in "
                "place; sum the totals before one backward, or run forward again"
            )
        if ctx.has_main_grad:
            dtotal = _expect_one(dtotal)
        dhidden, dweight = ctx.saved_tensors
        for gradient in (dhidden, dweight):
            if gradient is not None:
                # A scalar factor would be rounded to the gradient's dtype first.
                torch.mul(gradient, dtotal.view(1, 1), out=gradient)
        ctx.overwritten = True
        return dhidden, narrowed_in_place(dweight, ctx.dtype), *(None,) * ctx.num_others


def _expect_one(dtotal: Tensor) -> Tensor:
    """1, or NaN: main_grad holds the gradient of a total whose own gradient is 1."""
    if dispatch.debug() and float(dtotal) != 1.0:
        raise KernelError(
            f"{_OP}: the total's gradient is {float(dtotal)}; expected 1, because main_grad has "
            "the weight's gradient since forward; put the factor into weights"
        )
    return torch.where(dtotal == 1.0, dtotal, torch.nan)
