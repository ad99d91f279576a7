"""Digests that a flipped bit changes, and whether tensors are finite."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from phi4.engine.bits import are_finite, digest, digests
from phi4.engine.replicas import outvoted

INTEGERS = {torch.float32: torch.int32, torch.bfloat16: torch.int16}


@given(
    dtype=st.sampled_from(list(INTEGERS)),
    shape=st.sampled_from([(1,), (7,), (3, 5), (4, 1), (2, 3, 4)]),
    data=st.data(),
)
def test_any_flipped_bit_changes_the_digest(
    dtype: torch.dtype, shape: tuple[int, ...], data: st.DataObject
) -> None:
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    flipped = tensor.clone()
    place = data.draw(st.integers(0, tensor.numel() - 1))
    num_bits = 8 * tensor.element_size()
    bit = data.draw(st.integers(0, num_bits - 1))
    flipped.view(INTEGERS[dtype]).view(-1)[place] ^= (
        -(1 << bit) if bit == num_bits - 1 else 1 << bit
    )
    assert digest(flipped) != digest(tensor)


def test_digest_tells_the_sign_of_zero_and_the_order_of_rows() -> None:
    rows = torch.arange(12.0).view(4, 3)
    found = digests([rows, rows.flip(0), rows[0], rows[0].flip(0), torch.zeros(2), -torch.zeros(2)])
    assert len(set(found.tolist())) == 6
    assert digest(rows.t().contiguous().t()) == digest(rows)


def test_finite() -> None:
    wrong = [torch.tensor([1.0, value]) for value in (torch.nan, torch.inf, -torch.inf)]
    tensors = [torch.ones(2, 2), *wrong, torch.full((1,), 3e38, dtype=torch.bfloat16)]
    assert are_finite(tensors).tolist() == [True, False, False, False, True]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([5, 5, 5], ([], False)),
        ([5, 6], ([0, 1], True)),
        ([5, 6, 5], ([1], False)),
        ([5, 6, 7], ([0, 1, 2], True)),
        ([5, 5, 6, 6], ([0, 1, 2, 3], True)),
        ([6, 5, 5, 5, 7], ([0, 4], False)),
    ],
)
def test_majority(values: list[int], expected: tuple[list[int], bool]) -> None:
    assert outvoted(values) == expected
