"""How far a pass with FP8 deviates from one without it, and which layers that condemns."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import starmap
from typing import NamedTuple

import torch

from phi4.engine.model.fp8.lost_values import CASTS, Cast


@dataclass(frozen=True)
class FP8Limits:
    """Limits of the deviation from a pass without FP8.

    Attributes:
        loss_gap: largest |loss - plain loss|, per weight of the objective: nats per token.
        gradient_cosine: minimum cosine of a layer's gradient to its plain one.
        underflow: largest fraction of a linear's non-zero inputs or weights that become zero. Not
            for gradients: those of confidently predicted tokens are that small.
        saturation: largest fraction of numbers of any kind beyond the largest FP8 number.
    """

    loss_gap: float
    gradient_cosine: float
    underflow: float
    saturation: float


class LostShares(NamedTuple):
    """Fractions of the non-zero numbers of one kind in the worst linear of a layer."""

    underflow: float
    saturation: float


@dataclass(frozen=True)
class Distance:
    """Deviation of a pass from the plain one.

    Attributes:
        loss_gap: loss - plain loss; absolute, because a relative gap would grow where the loss is
            nearly 0.
        gradient_cosines: by global layer index.
    """

    loss_gap: float
    gradient_cosines: tuple[float, ...]

    def excess(self, limits: FP8Limits) -> float:
        """Return the largest deviation relative to its limit; NaN counts as infinite."""
        far = (
            abs(self.loss_gap) / limits.loss_gap,
            (1 - self.least_cosine) / (1 - limits.gradient_cosine),
        )
        return math.inf if any(map(math.isnan, far)) else max(far)

    def beyond(self, limits: FP8Limits) -> str:
        """Describe exceeded limits in words; empty if there are none. NaN exceeds."""
        if not abs(self.loss_gap) <= limits.loss_gap:
            return f"loss gap {self.loss_gap:.2g}, at most {limits.loss_gap:g} allowed"
        if not self.least_cosine >= limits.gradient_cosine:
            return (
                f"gradient cosine {self.least_cosine:.3f}, at least {limits.gradient_cosine:g} "
                f"required"
            )
        return ""

    @property
    def least_cosine(self) -> float:
        """Cosine of the worst layer; NaN if any is."""
        cosines = self.gradient_cosines
        return math.nan if any(map(math.isnan, cosines)) else min(cosines)


@dataclass(frozen=True)
class FP8Check:
    """Result of a check, the same on every rank.

    Attributes:
        distance: deviation of the pass with FP8.
        lost: by FP8 layer and by what was cast.
        fallbacks: layers that should stop using FP8, each with the reason.
    """

    distance: Distance
    lost: Mapping[int, Mapping[Cast, LostShares]]
    fallbacks: Mapping[int, str]


def distance_of(sums: Sequence[float]) -> Distance | None:
    """Return the deviation by the sums of a pass over all ranks; None if the plain one is not
    finite."""
    loss, plain_loss, weight, *others = sums
    rows = list(zip(others[::3], others[1::3], others[2::3], strict=True))
    if not all(map(math.isfinite, (plain_loss, *(plain for _, _, plain in rows)))):
        return None
    gap = (loss - plain_loss) / (weight or 1.0)
    return Distance(gap, tuple(starmap(_cosine, rows)))


def _cosine(product: float, square: float, plain_square: float) -> float:
    """Return 1 if both gradients are zero, and 0 if one is."""
    if square == plain_square == 0:
        return 1.0
    norms = math.sqrt(square) * math.sqrt(plain_square)
    return product / norms if norms else 0.0


def lost_shares(
    counts: torch.Tensor, fp8_layers: Sequence[int]
) -> dict[int, dict[Cast, LostShares]]:
    """Return, from counts [layers, linears, casts, 3], those of each layer's worst linear."""
    shares = counts[..., 1:] / counts[..., :1].clamp(min=1)
    worst = shares.amax(dim=1).tolist()
    return {
        layer: {what: LostShares(*worst[layer][index]) for index, what in enumerate(CASTS)}
        for layer in fp8_layers
    }


def layers_by_losses(
    lost: Mapping[int, Mapping[Cast, LostShares]], limits: FP8Limits
) -> dict[int, str]:
    """Return layers whose casts lose too much."""
    fallbacks = {}
    for layer, by_cast in lost.items():
        for what, shares in by_cast.items():
            underflow = limits.underflow if what != "gradient" else math.inf
            for kind, share, limit in (
                ("underflow", shares.underflow, underflow),
                ("saturation", shares.saturation, limits.saturation),
            ):
                if share > limit:
                    fallbacks[layer] = f"{kind} of {what} {share:.3f}, at most {limit:g} allowed"
    return fallbacks
