"""GPUs that phi4 knows: capacity and peak from their data sheets."""

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
    compute_capability: tuple[int, int]
    device_names: tuple[str, ...]
    """What the driver calls it. Whole names: `NVIDIA GH200 480GB`, a slice of a card and the PCIe
    forms contain the name of a card and have another peak."""


CARDS = {
    card.name: card
    for card in (
        Card(
            "h100",
            "H100 SXM 80 GB",
            80 * 10**9,
            989.4,
            "NVIDIA H100 data sheet, SXM",
            (9, 0),
            ("NVIDIA H100 80GB HBM3",),
        ),
        Card(
            "h200",
            "H200 SXM 141 GB",
            141 * 10**9,
            989.4,
            "NVIDIA H200 data sheet, SXM",
            (9, 0),
            ("NVIDIA H200",),
        ),
        Card(
            "a100",
            "A100 SXM 80 GB",
            80 * 10**9,
            312.0,
            "NVIDIA A100 data sheet, SXM 80 GB",
            (8, 0),
            ("NVIDIA A100-SXM4-80GB",),
        ),
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


def card_of_device(device_name: str) -> Card | None:
    """The card that the driver calls so, for example `NVIDIA H100 80GB HBM3`; None for others."""
    return next((card for card in CARDS.values() if device_name in card.device_names), None)
