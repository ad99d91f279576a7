"""The card of a device, by its whole name."""

import pytest

from phi4.model.cards import CARDS, card_of_device


@pytest.mark.parametrize(
    ("device_name", "card"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
    ],
)
def test_a_known_device_has_its_card(device_name: str, card: str) -> None:
    assert card_of_device(device_name) is CARDS[card]


@pytest.mark.parametrize(
    "device_name",
    [
        "NVIDIA GH200 480GB",
        "NVIDIA H100 PCIe",
        "NVIDIA H200 NVL",
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
        "NVIDIA B200",
        "",
    ],
)
def test_a_device_with_another_peak_is_not_taken_for_one_that_it_is_named_like(
    device_name: str,
) -> None:
    assert card_of_device(device_name) is None
