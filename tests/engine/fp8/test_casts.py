"""Scales and casts: the law of a scale, and the product that torch makes of it bit for bit."""

import math

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from phi4_kernels.dispatch import Choice

from phi4.engine.model.fp8.casts import cast, cast_whole
from phi4.engine.model.fp8.layers import layer_linears
from phi4.engine.model.fp8.product import product
from phi4.engine.model.fp8.recipe import BLOCK
from phi4.engine.model.fp8.scales import E4M3, E5M2, saturated, scale_of
from phi4.engine.model.implementations import unused_ops
from tests.support.engines import tiny_recipe

FORMATS = st.sampled_from([E4M3, E5M2])
M, N, K = 48, 32, 64
SHARED = {"tensorwise": ((M, K), (N, K)), "rowwise": ((1, K), (1, K))}


# The largest numbers themselves, which a maximum of 447 would give half the scale.
@example(448.0, E4M3)
@example(57344.0, E5M2)
@given(st.floats(2.0**-100, 2.0**100, width=32), FORMATS)
def test_scale_is_the_largest_power_of_two_that_fits(amax: float, dtype: torch.dtype) -> None:
    scale = scale_of(torch.tensor(amax), dtype).item()
    largest = torch.finfo(dtype).max
    assert math.frexp(scale)[0] == 0.5
    assert amax * scale <= largest < 2 * amax * scale


@pytest.mark.parametrize("amax", [0.0, math.inf, math.nan])
@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_no_scale_comes_of_what_has_none(amax: float, dtype: torch.dtype) -> None:
    assert scale_of(torch.tensor(amax), dtype) == 1.0


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_smallest_magnitude_has_a_finite_scale_and_inverse(dtype: torch.dtype) -> None:
    matrix = cast(torch.full((16, 16), 2.0**-149), dtype, (16, 16))
    assert matrix.inverse.isfinite().all() and (matrix.inverse > 0).all()


@pytest.mark.parametrize(("dtype", "largest"), [(E4M3, 448.0), (E5M2, 57344.0)])
def test_beyond_the_largest_number_is_the_largest_number(
    dtype: torch.dtype, largest: float
) -> None:
    values = torch.tensor([largest, 10 * largest, -math.inf, math.nan])
    found = saturated(values, dtype).float()
    assert found[:3].tolist() == [largest, largest, -largest] and found[3].isnan()


@pytest.mark.parametrize("scaling", SHARED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gradient", [E4M3, E5M2])
def test_product_is_that_of_the_values(
    scaling: str, dtype: torch.dtype, gradient: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(3)
    rows = torch.logspace(-3, 3, M)[:, None]
    x = torch.randn(M, K, generator=generator) * rows
    w = torch.randn(N, K, generator=generator)
    of_x, of_w = SHARED[scaling]
    a, b = cast(x, gradient, of_x), cast(w, E4M3, of_w)
    expected = (a.values() @ b.values().t()).to(dtype)
    for is_exact in (False, True):
        assert torch.equal(product(a, b, dtype, is_exact=is_exact), expected)


@pytest.mark.parametrize("shared", [(256, 256), (1, 256), (1, BLOCK), (BLOCK, BLOCK)])
def test_values_come_back_within_a_rounding(shared: tuple[int, int]) -> None:
    x = torch.randn(256, 256, generator=torch.Generator().manual_seed(1))
    matrix = cast(x, E4M3, shared)
    assert matrix.inverse.shape == (256 // shared[0], 256 // shared[1])
    # Half a unit of 3 bits, or of the least subnormal under the largest inverse.
    bound = x.abs() / 16 + matrix.inverse.max() * 2.0**-10
    assert ((matrix.values() - x).abs() <= bound).all()
    assert torch.equal(matrix.transposed().values(), matrix.values().t())


def test_blocks_do_not_share_an_outlier() -> None:
    x = torch.ones(BLOCK, 2 * BLOCK)
    x[0, 0] = 1e6
    assert cast(x, E4M3, (BLOCK, 2 * BLOCK)).values()[1, -1] == 0.0
    assert cast(x, E4M3, (BLOCK, BLOCK)).values()[1, -1] == 1.0
    assert cast(x, E4M3, (1, BLOCK)).values()[1, 1] == 1.0


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_whole_matrix_is_cast_both_ways_from_one_read(dtype: torch.dtype) -> None:
    x = torch.randn(48, 80, generator=torch.Generator().manual_seed(5)).bfloat16()
    x[3, 7] *= 300
    expected = cast(x, dtype, x.shape)
    # A view whose rows are not contiguous, as gradients may be.
    along_rows, along_columns = cast_whole(x.t().contiguous().t(), dtype)
    assert torch.equal(along_rows.data_RK.float(), expected.data_RK.float())
    assert torch.equal(along_columns.data_RK.float(), expected.data_RK.float().t())
    assert along_columns.data_RK.is_contiguous()
    assert along_rows.inverse.item() == along_columns.inverse.item() == expected.inverse.item()


@pytest.mark.parametrize(
    ("overrides", "unused"),
    [
        (("precision.fp8=torch",), ()),
        (("precision.fp8=torch", "precision.fp8_recipe=rowwise"), ("fp8_cast",)),
        (("precision.fp8=te", "precision.dtype=bf16"), ("fp8_cast",)),
        ((), ("fp8_cast",)),
    ],
)
def test_op_is_chosen_where_it_is_called(
    overrides: tuple[str, ...], unused: tuple[str, ...]
) -> None:
    assert unused_ops(tiny_recipe(*overrides)) == unused


def test_linears_cast_by_the_chosen_implementation() -> None:
    recipe = tiny_recipe("model.num_layers=3", "precision.fp8=torch")
    linears = layer_linears(recipe, [1], None, [Choice("fp8_cast", "cuda", "named")])
    assert {one.params["scaling"].implementation for one in linears[0]} == {"cuda"}
