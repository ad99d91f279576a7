"""The loss by PyTorch, Liger-Kernel and Transformer Engine, and the forms of our four entries.

A library computes per-token losses from logits, or the summed loss from hidden states; only plain
cross-entropy, which is all that the bench cases need. A form adapts a library's function to an
entry and returns gradients together with the outputs where the entry does.
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


def torch_losses() -> LossesOf:
    """PyTorch's."""
    return _torch_losses


def compiled_losses() -> LossesOf:
    """PyTorch's through torch.compile."""
    return torch.compile(_torch_losses, fullgraph=True, dynamic=False)


def liger_losses() -> LossesOf:
    """Liger-Kernel's."""
    from liger_kernel.ops.cross_entropy import LigerCrossEntropyFunction

    def losses_of(logits: Tensor, targets: Tensor, ignored: int) -> Tensor:
        # weight, ignored id, z-loss, smoothing, reduction, softcap, and whether the z-loss is
        # returned
        options = (None, ignored, 0.0, 0.0, "none", None, False)
        return LigerCrossEntropyFunction.apply(logits, targets, *options)[0]

    return losses_of


def te_losses() -> LossesOf:
    """Transformer Engine's."""
    from transformer_engine.pytorch.cross_entropy import parallel_cross_entropy

    def losses_of(logits: Tensor, targets: Tensor, ignored: int) -> Tensor:
        return parallel_cross_entropy(logits[None], targets[None], 0.0, False, None, ignored)[0]

    return losses_of


def torch_total() -> TotalOf:
    """PyTorch's behind a linear layer."""
    return _torch_total


def compiled_total() -> TotalOf:
    """PyTorch's behind a linear layer, through torch.compile."""
    return torch.compile(_torch_total, fullgraph=True, dynamic=False)


def chunked_total() -> TotalOf:
    """PyTorch's own linear cross-entropy in chunks, from 2.13 on."""
    from torch.nn import LinearCrossEntropyOptions

    def total_of(hidden: Tensor, weight: Tensor, targets: Tensor, ignored: int) -> Tensor:
        chunked = LinearCrossEntropyOptions()
        return F.linear_cross_entropy(
            hidden, weight, targets, options=chunked, reduction="sum", ignore_index=ignored
        )

    return total_of


def liger_total() -> TotalOf:
    """Liger-Kernel's fused linear cross-entropy."""
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    def total_of(hidden: Tensor, weight: Tensor, targets: Tensor, ignored: int) -> Tensor:
        options = (None, None, ignored, 0.0, 0.0, "sum", None, False, torch.float32)
        return LigerFusedLinearCrossEntropyFunction.apply(hidden, weight, targets, *options)[0]

    return total_of


def _torch_losses(logits: Tensor, targets: Tensor, ignored: int) -> Tensor:
    """In fp32: on bf16 logits PyTorch rounds the losses to bf16."""
    # Per token, like our op; a mean would be a different kernel.
    return F.cross_entropy(logits.float(), targets, ignore_index=ignored, reduction="none")


def _torch_total(hidden: Tensor, weight: Tensor, targets: Tensor, ignored: int) -> Tensor:
    return _torch_losses(F.linear(hidden, weight), targets, ignored).sum()


def of_logits(library: Callable[[], LossesOf]) -> Callable[..., Any]:
    """Entry cross_entropy."""
    losses_of = library()

    def run(logits: Tensor, targets: Tensor, options: Any) -> tuple[Tensor, ...]:
        losses = losses_of(logits, targets, options.ignore_index).float()
        return losses, -losses

    return run


def of_logits_with_gradient(library: Callable[[], LossesOf]) -> Callable[..., Any]:
    """Entry cross_entropy_sharded on one rank: forward and backward."""
    losses_of = library()

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
            # log_prob = -loss without smoothing and z-loss: both gradients reach the logits through
            # the loss.
            (gradient,) = torch.autograd.grad(losses, leaf, dlosses - dlog_probs)
        return losses.detach(), -losses.detach(), gradient

    return run


def of_hidden(library: Callable[[], LossesOf]) -> Callable[..., Any]:
    """Entry linear_cross_entropy."""
    losses_of = library()

    def run(
        hidden: Tensor, weight: Tensor, targets: Tensor, options: Any, chunk: int
    ) -> tuple[Tensor, ...]:
        losses = losses_of(F.linear(hidden, weight), targets, options.ignore_index).float()
        return losses, -losses

    return run


def total_with_gradients(library: Callable[[], TotalOf]) -> Callable[..., Any]:
    """Entry summed_linear_cross_entropy: forward, backward, the weight's gradient in fp32."""
    total_of = library()

    def run(
        hidden: Tensor, weight: Tensor, targets: Tensor, options: Any, chunk: int
    ) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            leaves = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
            total = total_of(*leaves, targets, options.ignore_index)
            dhidden, dweight = torch.autograd.grad(total, leaves)
        return total.detach().float(), dhidden, dweight.float()

    return run
