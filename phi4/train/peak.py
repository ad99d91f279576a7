"""The peak FLOP/s in MFU: from the recipe, from a card's data sheet, or unknown."""

from dataclasses import dataclass

from phi4.config import Recipe
from phi4.model.cards import CARDS, card_of_device

_FP8_NOTE = "; products in FP8 can be faster than that"


@dataclass(frozen=True)
class Peak:
    """Peak throughput of one GPU."""

    tflops: float | None
    """Dense; None where it is unknown."""
    reason: str
    """Source of the figure, or why there is none; a line for the console."""


def peak_of(recipe: Recipe, device_name: str | None) -> Peak:
    """The recipe's figure, else that of the card in the data sheet.

    Args:
        recipe: tracking.peak_tflops, and the precision that a data sheet's figure holds for.
        device_name: as the driver reports it; None for a CPU.
    """
    dtype, given = recipe.precision.dtype, recipe.tracking.peak_tflops
    if given is not None:
        reason = f"MFU: relative to {given:g} TFLOP/s per rank, from tracking.peak_tflops"
        return Peak(given, reason)
    remedy = "set tracking.peak_tflops"
    if device_name is None:
        return Peak(None, f"MFU: not reported, no peak is known for a CPU; {remedy}")
    card = card_of_device(device_name)
    if card is None:
        known = ", ".join(one.title for one in CARDS.values())
        return Peak(
            None,
            f"MFU: not reported, no peak is known for {device_name} (only for {known}); {remedy}",
        )
    if dtype != "bf16":
        return Peak(
            None,
            f"MFU: not reported, the known peak of {card.title} is for bf16 and "
            f"precision.dtype={dtype}; {remedy}",
        )
    return Peak(
        card.bf16_dense_tflops,
        f"MFU: relative to {card.bf16_dense_tflops:g} TFLOP/s per GPU, dense bf16 ({card.source})"
        + _FP8_NOTE * (recipe.precision.fp8 != "off"),
    )
