"""What the arithmetic of csrc must satisfy: the shipped build does, its mutants must not.

Every check takes a build and raises AssertionError or GateError.
"""

import math

import torch
from phi4_kernels.adamw import reference as adamw_reference
from phi4_kernels.fp8_cast import reference as cast_reference
from phi4_kernels.testing import error_rule
from torch import Tensor

from tests.csrc.host_forms import LINE, TENSOR, TILE, HostForms

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
HYPER = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}
ROWS, WIDTH = 17, 121
"""An odd number of elements: the last pack is cut."""


def thousand_steps(forms: HostForms, grad_dtype: torch.dtype, num_steps: int = 1000) -> None:
    """State after many steps by the error rule; bf16 and FP8 weights and amax in every bit."""
    draw = torch.Generator().manual_seed(5)
    scales = torch.logspace(-3, 3, ROWS).repeat_interleave(WIDTH)
    param = torch.randn(ROWS * WIDTH, generator=draw) * scales
    ours = tuple(t.clone() for t in (param, torch.zeros_like(param), torch.zeros_like(param)))
    eager, truth = ours, tuple(t.double() for t in ours)
    weight = torch.empty(param.numel(), dtype=torch.bfloat16)
    fp8 = torch.empty(param.numel(), dtype=FP8[0]), torch.tensor(3e-2), torch.zeros(())
    ours = tuple(t.clone() for t in ours)
    for step in range(1, num_steps + 1):
        hyper = HYPER | {"lr": HYPER["lr"] * (1 + math.cos(step / 300)) / 2}
        grad = (torch.randn(param.numel(), generator=draw) * scales).to(grad_dtype)
        scale = torch.rand((), generator=draw)
        fp8[2].zero_()
        forms.adamw(ours, grad, step, hyper, scale, weight, fp8)
        eager = adamw_reference.adamw(*eager, grad, step, **hyper, grad_scale=scale)
        truth = adamw_reference.adamw(*truth, grad, step, **hyper, grad_scale=scale)
        assert torch.equal(weight, ours[0].bfloat16())
    expected, amax = cast_reference.cast_tensor(ours[0][None], fp8[1], FP8[0])
    same_bytes(fp8[0], expected[0])
    assert torch.equal(fp8[2], amax)
    for name, *values in zip(("param", "exp_avg", "exp_avg_sq"), ours, eager, truth, strict=True):
        error_rule.check(name, *(value.view(ROWS, WIDTH) for value in values))


def first_step(forms: HostForms) -> None:
    """Exact in the limit: |update| of the first step is lr, whatever the gradient."""
    state = (torch.ones(5), torch.zeros(5), torch.zeros(5))
    grad = torch.tensor([1e-3, -1e3, 2.0, -1.0, 0.0])
    forms.adamw(state, grad, 1, HYPER | {"weight_decay": 0.0})
    expected = 1 - HYPER["lr"] * grad.sign()
    assert torch.allclose(state[0], expected, rtol=0, atol=1e-6), state[0]


def norm(forms: HostForms, dtype: torch.dtype) -> None:
    """Within the bound of the longest chain of additions, for sizes around packs and chunks."""
    draw = torch.Generator().manual_seed(6)
    sizes = (0, 1, 3, 65536, 0, 65537, 200001, 4)
    tensors = [torch.randn(size, generator=draw).mul(2.0**i).to(dtype) for i, size in
               enumerate(sizes)]  # fmt: skip
    exact = math.fsum(float(x) * float(x) for tensor in tensors for x in tensor)
    chain = 256 + 8 + len(sizes)
    assert abs(float(forms.square_sum(tensors)) - exact) <= chain * 2.0**-53 * exact


def norm_extremes(forms: HostForms) -> None:
    """No square overflows or vanishes; what is not finite stays visible; nothing gives zero."""
    for value in (1e30, 1e-30, 2.0**-149):
        total = float(forms.square_sum([torch.full((1000,), value)]))
        single = float(torch.tensor(value).double())
        assert math.isclose(total, 1000 * single * single, rel_tol=1e-13)
    assert forms.square_sum([torch.tensor([1.0, torch.nan])]).isnan()
    assert forms.square_sum([torch.tensor([1.0, -torch.inf])]).isinf()
    assert float(forms.square_sum([torch.empty(0)])) == 0.0


def same_bytes(ours: Tensor, expected: Tensor) -> None:
    """Equal in every bit, any NaN for any NaN."""
    assert ours.shape == expected.shape and ours.dtype == expected.dtype
    nan = expected.float().isnan()
    assert torch.equal(ours.float().isnan(), nan)
    raw, wanted = ours.contiguous().view(torch.uint8), expected.contiguous().view(torch.uint8)
    assert torch.equal(raw[~nan], wanted[~nan])


def every_code_point(forms: HostForms, dtype: torch.dtype) -> None:
    """All FP8 numbers, all midpoints and their neighbours, all bf16 numbers: torch's casts."""
    codes = torch.arange(256, dtype=torch.uint8).view(dtype).float()
    finite = codes[codes.isfinite()].sort().values
    middle = (finite[1:] + finite[:-1]) / 2
    beside = [torch.nextafter(middle, torch.tensor(side)) for side in (-math.inf, math.inf)]
    largest = torch.tensor([1.0, 1.001, 1.07, 2.0, 1e30, math.inf]) * torch.finfo(dtype).max
    single = torch.cat((codes, middle, *beside, largest, -largest, torch.tensor([2.0**-149])))
    half = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16)
    for values in (single, half):
        x = values.view(1, -1)
        expected, amax = cast_reference.cast_tensor(x, torch.ones(()), dtype)
        rowwise, columnwise, _, _, found = forms.cast(x, TENSOR, dtype, torch.ones(()))
        same_bytes(rowwise, expected)
        same_bytes(columnwise, expected.t())
        assert found.isnan() and amax.isnan()


def _matrix(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Scales from 1e-3 to 1e3 by row, with zeros, a denormal and what is not finite in corners."""
    draw = torch.Generator().manual_seed(rows + columns)
    x = torch.randn(rows, columns, generator=draw) * torch.logspace(-3, 3, rows)[:, None]
    if rows > 130 and columns > 130:
        x[:128, :128], x[:128, 128:256], x[0, 0] = 0.0, 0.0, 2.0**-140
        x[-1, -1], x[-1, 0] = torch.nan, torch.inf
    return x.to(dtype)


def casts(forms: HostForms, x_dtype: torch.dtype, dtype: torch.dtype) -> None:
    """Every scaling and layout equals the reference in every bit, edges and no rows included."""
    for shape in ((0, 5), (3, 0), (1, 1), (5, 300), (260, 263), (128, 256)):
        x = _matrix(*shape, x_dtype)
        scale = torch.tensor(3.7)
        rowwise, columnwise, _, _, amax = forms.cast(x, TENSOR, dtype, scale)
        expected, largest = cast_reference.cast_tensor(x, scale, dtype)
        same_bytes(rowwise, expected)
        same_bytes(columnwise, expected.t())
        assert torch.equal(amax.nan_to_num(-1), largest.nan_to_num(-1))
        for scaling, block_rows in ((LINE, 1), (TILE, 128)):
            rowwise, columnwise, inverse, inverse_columns, _ = forms.cast(x, scaling, dtype)
            for ours, scales, of in (
                (rowwise, inverse, x),
                (columnwise, inverse_columns if scaling == LINE else inverse.t(), x.t()),
            ):
                expected, wanted = cast_reference.cast_blocks(of.contiguous(), block_rows, dtype)
                same_bytes(ours, expected)
                assert torch.equal(scales.nan_to_num(-1), wanted.nan_to_num(-1))


def adamw_all(forms: HostForms) -> None:
    """What a mutant of the optimizer must fail; few steps show it."""
    first_step(forms)
    thousand_steps(forms, torch.float32, 30)


def norm_all(forms: HostForms) -> None:
    """What a mutant of the norm must fail."""
    norm(forms, torch.float32)
    norm_extremes(forms)


def casts_all(forms: HostForms) -> None:
    """What a mutant of the casts must fail."""
    for dtype in FP8:
        every_code_point(forms, dtype)
        casts(forms, torch.float32, dtype)
