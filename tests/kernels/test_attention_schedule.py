"""dk and dv fill a GPU at phi-4's sizes, and their parts give what the whole gives."""

import pytest
from phi4_kernels.testing.interpreted import InterpretedProcess

from tests.kernels.attention_schedule import used_share

MOST_BYTES = 640 * 128 * 128 * 2 * 4
"""Of the sums of parts: 640 tiles of 128 keys, of dk and dv, fp32, at D = 128."""


@pytest.mark.parametrize(
    ("costs", "num_slots", "share"),
    [
        ([4, 4, 4], 3, 1.0),
        ([3, 1, 1, 1], 2, 1.0),
        ([1, 1, 3], 2, 5 / 8),
        ([2], 4, 1 / 4),
    ],
)
def test_programs_start_in_order_where_a_slot_is_free(
    costs: list[int], num_slots: int, share: float
) -> None:
    assert used_share(costs, num_slots) == share


# One document in one row, by tokens and key heads of a tensor rank: 10 at TP 1, 5 at TP 2.
@pytest.mark.parametrize(
    ("tokens", "num_groups"),
    [
        (4096, 10),
        (4096, 5),
        pytest.param(8192, 5, marks=pytest.mark.slow),
        pytest.param(16384, 10, marks=pytest.mark.slow),
        pytest.param(16384, 5, marks=pytest.mark.slow),
    ],
)
def test_dk_and_dv_fill_an_h200(
    interpreted: InterpretedProcess, tokens: int, num_groups: int
) -> None:
    found = interpreted.call(
        "tests.kernels.attention_schedule:dkdv_schedule",
        lengths=[tokens],
        num_groups=num_groups,
        group=4,
    )
    assert 0.95 <= found["share"] <= 1
    assert found["bytes"] <= MOST_BYTES


@pytest.mark.parametrize(
    ("num_keys", "num_groups", "group", "parts"),
    [
        (4096, 10, 4, 2),
        (4096, 5, 4, 4),
        (16384, 5, 4, 1),
        (8192, 5, 4, 2),
        (128, 1, 7, 7),
        (128 * 100, 1, 7, 1),
        (128 * 100, 1, 6, 6),
        (128 * 107, 1, 6, 3),
        (128 * 321, 1, 8, 1),
        (1, 640, 4, 1),
        (1, 1, 1, 1),
    ],
)
def test_a_group_is_parted_as_far_as_programs_are_few(
    interpreted: InterpretedProcess, num_keys: int, num_groups: int, group: int, parts: int
) -> None:
    sizes = {"num_keys": num_keys, "num_groups": num_groups, "group": group}
    assert interpreted.call("tests.kernels.attention_checks:parts_of_a_long_row", **sizes) == parts


def test_parts_give_what_the_whole_gives(interpreted: InterpretedProcess) -> None:
    interpreted.call("tests.kernels.attention_checks:parts_give_what_the_whole_gives")
