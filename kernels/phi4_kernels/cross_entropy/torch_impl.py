"""Cross-entropy on PyTorch's own kernels, a few rows at a time: no fp32 copy of all logits."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

_WIDENED_ELEMENTS = 1 << 24
_LOG2_E = math.log2(math.e)
"""On a CPU exp2 takes a third of exp's time, and the kernels use exp2 as well."""


def _slices(logits: Tensor) -> Iterator[slice]:
    """Groups of rows of at most _WIDENED_ELEMENTS elements, or one row."""
    rows = max(1, _WIDENED_ELEMENTS // logits.shape[1])
    return (slice(start, start + rows) for start in range(0, logits.shape[0], rows))


def _columns(targets: Tensor, first: int, width: int) -> tuple[Tensor, Tensor]:
    """[T, 1] columns of this shard, clamped into it, and whether the shard owns them."""
    columns = (targets.long() - first).unsqueeze(-1)
    return columns.clamp(0, width - 1), (columns >= 0) & (columns < width)


def statistics(
    logits: Tensor, targets: Tensor, first: int, ignore_index: int, with_sum: bool
) -> Tensor:
    """See op._statistics."""
    out = logits.new_empty((logits.shape[0], 3 + with_sum), dtype=torch.float32)
    for part in _slices(logits):
        x = logits[part].float()
        columns, owned = _columns(targets[part], first, x.shape[1])
        largest = x.amax(-1, keepdim=True)
        # A shard that is all -inf must contribute 0, not NaN.
        largest.clamp_(min=torch.finfo(torch.float32).min)
        out[part, 2:3] = torch.where(owned, x.gather(-1, columns), 0.0)
        if with_sum:
            out[part, 3] = x.sum(-1)
        out[part, :1] = largest
        # l = sum_j exp(x_j - m), in place: x is not needed any more.
        out[part, 1] = x.sub(largest).mul_(_LOG2_E).exp2_().sum(-1)
    return out.masked_fill_((targets == ignore_index).unsqueeze(-1), 0.0)


def combine(
    statistics: Tensor,
    targets: Tensor,
    weights: Tensor | None,
    vocabulary: int,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """See op._combine."""
    ignored = targets == ignore_index
    parts = statistics.double()
    largest, total, picked = parts[0, :, :3].unbind(-1)
    if parts.shape[0] > 1:
        largest, picked = parts[..., 0].amax(0), parts[..., 2].sum(0)
        # l = sum_r l_r * exp(m_r - m) over the ranks r
        total = (parts[..., 1] * (parts[..., 0] - largest).exp()).sum(0)
    total = torch.where((targets < 0) | (targets >= vocabulary), torch.nan, total)
    log_sum = total.log()
    # log_prob = x_y - m - log(l)
    log_probs = picked - largest - log_sum
    losses, slope = -log_probs, torch.ones_like(total)
    if label_smoothing or z_loss:
        log_normalizer = largest + log_sum
    if label_smoothing:
        # Label smoothing e: (1 - e) * -log p_y + e * (lse - mean_j x_j)
        even = log_normalizer - parts[..., 3].sum(0) / vocabulary
        losses = (1 - label_smoothing) * losses + label_smoothing * even
    if z_loss:
        losses = losses + z_loss * log_normalizer.square()
        # d loss / d lse without smoothing and weight
        slope = 1 + 2 * z_loss * log_normalizer
    if weights is not None:
        losses = losses * weights
    normalizer = torch.stack((largest, total.reciprocal(), slope), dim=-1)
    return (
        losses.float().masked_fill_(ignored, 0.0),
        log_probs.float().masked_fill_(ignored, 0.0),
        normalizer.float().masked_fill_(ignored.unsqueeze(-1), 0.0),
    )


def backward(
    logits: Tensor,
    targets: Tensor,
    weights: Tensor | None,
    normalizer: Tensor,
    dlosses: Tensor | None,
    dlog_probs: Tensor | None,
    first: int,
    vocabulary: int,
    ignore_index: int,
    label_smoothing: float,
) -> None:
    """See op._backward; overwrites logits [T, V / P]."""
    largest, inverse, slope = normalizer.split(1, dim=-1)
    zeros = torch.zeros_like(largest)
    dloss = zeros if dlosses is None else dlosses.unsqueeze(-1)
    if weights is not None:
        dloss = dloss * weights.unsqueeze(-1)
    dlog_prob = zeros if dlog_probs is None else dlog_probs.unsqueeze(-1)
    # The rounding of the scale is common to a row, so there is one scale per row.
    scale = (inverse.double() * (dloss.double() * slope - dlog_prob)).float()
    # dx_j = p_j * (dloss * slope - dlog_prob) + [j = y] * at_target - dloss * e / V
    at_target = dlog_prob - dloss * (1 - label_smoothing)
    # All bits or none: clears ignored rows, NaN too, in a tenth of masked_fill_'s time on a CPU.
    counted = (targets != ignore_index).unsqueeze(-1).int().neg()
    for part in _slices(logits):
        columns, owned = _columns(targets[part], first, logits.shape[1])
        gradient = logits[part].float().sub_(largest[part])
        gradient.mul_(_LOG2_E).exp2_().mul_(scale[part])
        if label_smoothing:
            gradient.sub_(dloss[part] * (label_smoothing / vocabulary))
        gradient.scatter_add_(-1, columns, at_target[part] * owned)
        gradient.view(torch.int32).bitwise_and_(counted[part])
        if logits.dtype != torch.float32:
            logits[part] = gradient
