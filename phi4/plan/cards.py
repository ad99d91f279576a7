"""GPUs that a plan can name: capacity and peak from their data sheets."""

from dataclasses import dataclass

from phi4.errors import ConfigError


@dataclass(frozen=True)
class Card:
    """A GPU."""

    name: str
    title: str
    capacity_bytes: int
    """The data sheet's decimal gigabytes, all of which a plan may fill. Conservative: the memory is
    sold rounded down, and torch reports more (an H100 SXM about 79 GiB, the plan uses 74.5)."""
    bf16_dense_tflops: float
    """Peak without sparsity."""
    source: str


CARDS = {
    card.name: card
    for card in (
        Card("h100", "H100 SXM 80 GB", 80 * 10**9, 989.4, "NVIDIA H100 data sheet, SXM"),
        Card("h200", "H200 SXM 141 GB", 141 * 10**9, 989.4, "NVIDIA H200 data sheet, SXM"),
        Card("a100", "A100 SXM 80 GB", 80 * 10**9, 312.0, "NVIDIA A100 data sheet, SXM 80 GB"),
    )
}


def card_named(name: str) -> Card:
    """The card of a name.

    Raises:
        ConfigError: there is none.
    """
    if name not in CARDS:
        raise ConfigError(f"--gpu {name} is not known; use {', '.join(CARDS)}")
    return CARDS[name]
