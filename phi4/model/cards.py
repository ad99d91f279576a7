"""GPUs known to phi4, with memory capacity and peak throughput from their data sheets."""

from dataclasses import dataclass

from phi4.errors import ConfigError


@dataclass(frozen=True)
class Card:
    """A GPU."""

    name: str
    title: str
    capacity_bytes: int
    """Memory in the data sheet's decimal gigabytes; a plan may use all of it. Conservative: torch
    reports more (about 79 GiB on an H100 SXM; the plan uses 74.5)."""
    bf16_dense_tflops: float
    """Peak without sparsity."""
    source: str
    compute_capability: tuple[int, int]
    device_names: tuple[str, ...]
    """Device names as the driver reports them. Matched exactly: `NVIDIA GH200 480GB`, MIG slices
    and PCIe variants contain the name of a card but have another peak."""


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
    """Return the card with a given name.

    Raises:
        ConfigError: no card has that name.
    """
    if name not in CARDS:
        raise ConfigError(f"--gpu {name} is not known; use {', '.join(CARDS)}")
    return CARDS[name]


def card_of_device(device_name: str) -> Card | None:
    """Return the card with a given driver name, for example `NVIDIA H100 80GB HBM3`, or None."""
    return next((card for card in CARDS.values() if device_name in card.device_names), None)
