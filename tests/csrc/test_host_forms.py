"""The arithmetic of the CUDA ops over real buffers, on the host, by the error rule."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.csrc import host_checks
from tests.csrc.host_checks import FP8, HYPER
from tests.csrc.host_forms import HostForms

DTYPES = (torch.float32, torch.bfloat16)


@pytest.mark.parametrize("grad_dtype", DTYPES)
def test_thousand_steps_of_adamw(forms: HostForms, grad_dtype: torch.dtype) -> None:
    host_checks.thousand_steps(forms, grad_dtype)


def test_first_step_is_the_learning_rate(forms: HostForms) -> None:
    host_checks.first_step(forms)


@given(start=st.integers(0, 5), size=st.integers(0, 40))
def test_adamw_is_the_same_at_any_alignment_and_stays_inside(
    forms: HostForms, start: int, size: int
) -> None:
    draw = torch.Generator().manual_seed(size)
    values = torch.rand(4, size, generator=draw)
    buffers = torch.full((4, 64), torch.nan)
    weights = torch.full((64,), torch.nan, dtype=torch.bfloat16)
    buffers[:, start : start + size] = values
    *cut, grad = (row[start : start + size] for row in buffers)
    forms.adamw(tuple(cut), grad, 3, HYPER, weight=weights[start : start + size])
    apart = tuple(row.clone() for row in values)
    forms.adamw(apart[:3], apart[3], 3, HYPER)
    for ours, alone in zip(cut, apart, strict=False):
        assert torch.equal(ours, alone)
    assert buffers.isnan().sum() == 4 * (64 - size)
    assert weights.isnan().sum() == 64 - size


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_bad_gradient_spoils_its_own_element_only(forms: HostForms, bad: float) -> None:
    grad = torch.ones(9)
    grad[4] = bad
    state = (torch.ones(9), torch.zeros(9), torch.zeros(9))
    forms.adamw(state, grad, 1, HYPER)
    assert [not bool(x.isfinite()) for x in state[0]] == [i == 4 for i in range(9)]


def test_denormal_gradients_and_moments_stay_finite(forms: HostForms) -> None:
    tiny = torch.full((8,), 2.0**-149)
    state = (torch.ones(8), tiny.clone(), tiny.clone())
    forms.adamw(state, tiny, 1, HYPER)
    assert all(t.isfinite().all() for t in state)
    assert torch.equal(state[1], tiny)


@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_of_many_sizes(forms: HostForms, dtype: torch.dtype) -> None:
    host_checks.norm(forms, dtype)


def test_norm_of_extremes(forms: HostForms) -> None:
    host_checks.norm_extremes(forms)


@pytest.mark.parametrize("size", [65536, 70000])
def test_norm_has_the_same_bits_at_any_alignment(forms: HostForms, size: int) -> None:
    values = torch.randn(size, generator=torch.Generator().manual_seed(1))
    shifted = torch.empty(size + 1)[1:].copy_(values)
    assert shifted.data_ptr() % 16 and not values.data_ptr() % 16
    assert forms.square_sum([shifted]) == forms.square_sum([values])


@pytest.mark.parametrize("dtype", FP8)
def test_every_code_point(forms: HostForms, dtype: torch.dtype) -> None:
    host_checks.every_code_point(forms, dtype)


@pytest.mark.parametrize("x_dtype", DTYPES)
@pytest.mark.parametrize("dtype", FP8)
def test_casts_of_all_scalings(forms: HostForms, x_dtype: torch.dtype, dtype: torch.dtype) -> None:
    host_checks.casts(forms, x_dtype, dtype)


def test_tile_slots_are_all_different_and_conflict_free(forms: HostForms) -> None:
    slots = [[forms.tile_slot(row, column) for column in range(128)] for row in range(128)]
    assert sorted(slot for row in slots for slot in row) == list(range(128 * 128))
    for group in range(0, 128, 4):
        # Lanes read the same four columns of rows 0, 4, 8, ...: 8 lanes of fp32 at a time.
        for first in range(0, 32, 8):
            banks = [slots[4 * lane][group + i] % 32 for lane in range(first, first + 8)
                     for i in range(4)]  # fmt: skip
            assert sorted(banks) == list(range(32))
