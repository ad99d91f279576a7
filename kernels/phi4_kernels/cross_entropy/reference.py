"""The definition of cross-entropy over a whole vocabulary, with its regularisers.

Log-probabilities and losses are computed in fp32 for half precision and stay in fp32; only the
gradient is rounded to the dtype of the logits, once.
"""

import torch
from torch import Tensor

from phi4_kernels.cross_entropy.options import PLAIN, LossOptions
from phi4_kernels.reference_arithmetic import widened


def cross_entropy(
    logits: Tensor,
    targets: Tensor,
    options: LossOptions = PLAIN,
    *,
    weights: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """[T, V], [T] -> per-token losses [T] (weighted) and log-probabilities of the targets [T]."""
    counted = targets != options.ignore_index
    columns = torch.where(counted, targets, 0).long().unsqueeze(-1)
    x = widened(logits)
    # log_prob = x_y - m - log sum_j exp(x_j - m); m, the maximum, only prevents overflow.
    largest = x.detach().amax(-1)
    shifted = x - largest.unsqueeze(-1)
    log_sum = shifted.exp().sum(-1).log()
    log_probs = shifted.gather(-1, columns).squeeze(-1) - log_sum
    losses = -log_probs
    if options.label_smoothing:
        # Label smoothing e: (1 - e) * -log p_y + e * mean_j(-log p_j)
        even = log_sum - shifted.mean(-1)
        losses = (1 - options.label_smoothing) * losses + options.label_smoothing * even
    if options.z_loss:
        # z-loss: z * lse^2, lse = m + log sum_j exp(x_j - m)
        losses = losses + options.z_loss * (largest + log_sum).square()
    if weights is not None:
        losses = losses * widened(weights)
    # where() and not a product: 0 * NaN is NaN.
    return torch.where(counted, losses, 0.0), torch.where(counted, log_probs, 0.0)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    options: LossOptions = PLAIN,
    *,
    weights: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """[T, H], [V, H], [T] -> as cross_entropy of the logits hidden @ weight.T."""
    return cross_entropy(hidden @ weight.t(), targets, options, weights=weights)
