"""Other implementations of the loss in the form of our entries, gradients beside their outputs.

A provider gives per-token losses of logits, or the summed loss of hidden states; only plain
cross-entropy, which is what the bench cases ask for.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

LossesOf = Callable[[Tensor, Tensor, int], Tensor]
"""logits [T, V], targets [T], ignored id -> losses [T]."""
TotalOf = Callable[[Tensor, Tensor, Tensor, int], Tensor]
"""hidden [T, H], weight [V, H], targets [T], ignored id -> sum of losses []."""


def torch_losses(logits: Tensor, targets: Tensor, ignored: int) -> Tensor:
    """PyTorch's in fp32: on bf16 logits it rounds the losses to bf16."""
    return F.cross_entropy(logits.float(), targets, ignore_index=ignored, reduction="none")


def torch_total(hidden: Tensor, weight: Tensor, targets: Tensor, ignored: int) -> Tensor:
    """The same behind a linear layer."""
    return torch_losses(F.linear(hidden, weight), targets, ignored).sum()


def of_logits(losses_of: LossesOf) -> Callable[..., Any]:
    """Entry cross_entropy."""

    def run(logits: Tensor, targets: Tensor, options: Any) -> tuple[Tensor, ...]:
        losses = losses_of(logits, targets, options.ignore_index).float()
        return losses, -losses

    return run


def with_gradient(losses_of: LossesOf) -> Callable[..., Any]:
    """Entry cross_entropy_sharded on one rank: forward and backward."""

    def run(
        logits: Tensor,
        targets: Tensor,
        options: Any,
        num_ranks: int,
        dlosses: Tensor,
        dlog_probs: Tensor,
    ) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            leaf = logits.detach().requires_grad_()
            losses = losses_of(leaf, targets, options.ignore_index).float()
            (gradient,) = torch.autograd.grad(losses, leaf, dlosses - dlog_probs)
        return losses.detach(), -losses.detach(), gradient

    return run


def of_hidden(losses_of: LossesOf) -> Callable[..., Any]:
    """Entry linear_cross_entropy."""

    def run(
        hidden: Tensor, weight: Tensor, targets: Tensor, options: Any, chunk: int
    ) -> tuple[Tensor, ...]:
        losses = losses_of(F.linear(hidden, weight), targets, options.ignore_index).float()
        return losses, -losses

    return run


def with_gradients(total_of: TotalOf) -> Callable[..., Any]:
    """Entry summed_linear_cross_entropy: forward, backward, the weight's gradient in fp32."""

    def run(
        hidden: Tensor, weight: Tensor, targets: Tensor, options: Any, chunk: int
    ) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            leaves = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
            total = total_of(*leaves, targets, options.ignore_index)
            dhidden, dweight = torch.autograd.grad(total, leaves)
        return total.detach().float(), dhidden, dweight.float()

    return run
