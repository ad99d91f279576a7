"""The rule itself: what it lets pass, what it does not, and that poison is seen."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from phi4_kernels.errors import GateError
from phi4_kernels.testing import error_rule
from phi4_kernels.testing.poison import poisoned

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@given(st.sampled_from(DTYPES), st.integers(-14, 15), st.floats(1.0, 1.999))
def test_ulp_is_the_gap_to_the_next_number(dtype: torch.dtype, power: int, factor: float) -> None:
    value = torch.tensor(factor * 2.0**power, dtype=torch.float64).to(dtype)
    bits = value.view(torch.int32 if dtype == torch.float32 else torch.int16)
    following = (bits + 1).view(dtype).double()
    gap = following - value.double()
    assert float(error_rule.ulp(value.double(), dtype)) == float(gap)


@pytest.mark.parametrize("dtype", DTYPES)
def test_eager_obeys_its_own_rule(dtype: torch.dtype) -> None:
    truth = torch.randn(8, 64, dtype=torch.float64)
    eager = truth.to(dtype)
    margin = error_rule.check("y", eager, eager, truth)
    assert margin.largest <= 0.5 and margin.row <= 0.5


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_off_by_three_times_eager_is_red(dtype: torch.dtype) -> None:
    # One small row among large ones: the largest error hides it, the row norm does not.
    truth = torch.randn(8, 4096, dtype=torch.float64) * 1e3
    truth[5] *= 1e-6
    eager = truth.to(dtype)
    ours = eager.clone()
    ours[5] = (truth[5] + 3 * (eager[5].double() - truth[5])).to(dtype)
    ours[5] = (ours[5].double() * (1 + 4 * torch.finfo(dtype).eps)).to(dtype)
    with pytest.raises(GateError, match="row 5"):
        error_rule.check("y", ours, eager, truth)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_single_unwritten_element_is_red(value: float) -> None:
    truth = torch.randn(4, 16, dtype=torch.float64)
    ours = truth.float()
    ours[2, 3] = value
    with pytest.raises(GateError):
        error_rule.check("y", ours, truth.float(), truth)


def test_a_wrong_shape_or_dtype_is_red() -> None:
    truth = torch.randn(4, 16, dtype=torch.float64)
    with pytest.raises(GateError, match="expected"):
        error_rule.check("y", truth.float()[:3], truth.float(), truth)
    with pytest.raises(GateError, match="bfloat16"):
        error_rule.check("y", truth.bfloat16(), truth.float(), truth)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float8_e4m3fn])
def test_outputs_are_poisoned(dtype: torch.dtype) -> None:
    with poisoned():
        assert torch.empty(3, 5, dtype=dtype).float().isnan().all()
        assert torch.empty((3, 5), dtype=dtype).shape == (3, 5)
        assert torch.empty_strided((3, 5), (7, 1), dtype=dtype).stride() == (7, 1)
        like = torch.empty(2, dtype=dtype)
        assert like.new_empty(3, 5).float().isnan().all() and like.new_empty(3).dtype is dtype
        assert like.new_empty((3, 5), dtype=torch.int8).eq(-1).all()
    assert torch.empty(0).device.type == "cpu"
    assert "new_empty" not in vars(torch.Tensor)


@pytest.mark.parametrize("offset", [-1, 15])
def test_a_write_past_either_end_is_seen(offset: int) -> None:
    with poisoned() as guard:
        buffer = torch.empty(15, dtype=torch.float32)
        guard.verify()
        torch.as_strided(buffer, (1,), (1,), buffer.storage_offset() + offset).fill_(0.0)
        with pytest.raises(GateError, match="guard bands"):
            guard.verify()


def test_guarded_inputs_keep_values_and_strides() -> None:
    tensor = torch.randn(6, 9)[:, :4]
    with poisoned() as guard:
        copy = guard.guarded(tensor)
    assert torch.equal(copy, tensor) and copy.stride() == tensor.stride()
    assert copy.as_strided((6, 5), (9, 1))[:5, 4].isnan().all()
