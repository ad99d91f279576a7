"""Wrong input of the projection with its cross-entropy is a typed error, or has a right result."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from phi4_kernels.cross_entropy import (
    LinearLayout,
    linear_cross_entropy,
    summed_linear_cross_entropy,
)
from phi4_kernels.errors import DeviceError, DtypeError, KernelError, ShapeError, TargetError

FUNCTIONS = (linear_cross_entropy, summed_linear_cross_entropy)
X, W, Y = torch.randn(3, 4), torch.randn(8, 4), torch.tensor([0, 7, 3])


BAD = {
    "hidden in fp64": (lambda f: f(X.double(), W, Y), DtypeError, "float64"),
    "weight of another dtype": (lambda f: f(X, W.half(), Y), DtypeError, "float16"),
    "one row": (lambda f: f(X[0], W, Y[0]), ShapeError, r"\(4,\)"),
    "no ids": (lambda f: f(X, W[:0], Y), ShapeError, r"\(0, 4\)"),
    "weight of another width": (lambda f: f(X, W[:, :3], Y), ShapeError, r"\(8, 3\)"),
    "a target too few": (lambda f: f(X, W, Y[:2]), ShapeError, r"\(2,\)"),
    "targets as floats": (lambda f: f(X, W, Y.float()), DtypeError, "float32"),
    "weights that learn": (
        lambda f: f(X, W, Y, weights=torch.ones(3, requires_grad=True)),
        KernelError,
        "detach",
    ),
    "weight elsewhere": (lambda f: f(X, W.to("meta"), Y), DeviceError, "meta"),
    "main_grad in bf16": (
        lambda f: f(X, W, Y, main_grad=torch.zeros(8, 4).bfloat16()),
        DtypeError,
        "main_grad is torch.bfloat16",
    ),
    "main_grad of another shape": (
        lambda f: f(X, W, Y, main_grad=torch.zeros(4, 8)),
        ShapeError,
        r"main_grad has shape \(4, 8\)",
    ),
    "main_grad whose rows are one": (
        lambda f: f(X, W, Y, main_grad=torch.zeros(1, 4).expand(8, 4)),
        ShapeError,
        "do not overlap",
    ),
    "empty chunks": (lambda f: LinearLayout(chunk_tokens=0), KernelError, "chunk_tokens is 0"),
    "parts without ranks": (
        lambda f: LinearLayout(sequence_parallel=True),
        KernelError,
        "without a group",
    ),
}


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_a_typed_error(case: str, function: Callable) -> None:
    call, error, text = BAD[case]
    with pytest.raises(error, match=text) as raised:
        call(function)
    assert "\n" not in str(raised.value) and str(raised.value).count(";") >= 1


@pytest.mark.parametrize("function", FUNCTIONS)
def test_ids_are_checked_under_the_debug_switch(function: Callable, monkeypatch: Any) -> None:
    foreign = torch.tensor([0, 8, -1])
    assert function(X, W, foreign).losses.isnan().tolist() == [False, True, True]
    monkeypatch.setenv("PHI4_KERNELS_DEBUG", "1")
    with pytest.raises(TargetError, match="span -1 to 8; expected 0 to 7 or -100"):
        function(X, W, foreign)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_any_strides_of_hidden_give_the_same(function: Callable) -> None:
    wide = torch.randn(2, 3, 8)
    views = wide[..., ::2], wide[..., :4].transpose(0, 1), torch.randn(1, 4).expand(2, 3, 4)
    for view in views:
        targets = torch.randint(8, view.shape[:2])
        strided, dense = view.detach().requires_grad_(), view.contiguous().detach()
        dense.requires_grad_()
        for hidden in (strided, dense):
            out = function(hidden, W, targets, layout=LinearLayout(chunk_tokens=4))
            assert out.losses.shape == targets.shape
            out[0].sum().backward()
        assert torch.equal(strided.grad, dense.grad)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_no_tokens_and_all_ignored_have_gradients_of_zero(function: Callable) -> None:
    for hidden, targets in ((X[:0], Y[:0]), (X, torch.full((3,), -100))):
        leaf, weight = hidden.clone().requires_grad_(), W.clone().requires_grad_()
        out = function(leaf, weight, targets)
        out[0].sum().backward()
        assert not out.losses.any() and not leaf.grad.any() and not weight.grad.any()
