"""Autograd and torch.autocast behaviour that all ops and implementations share."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from phi4_kernels.errors import KernelError

_Function = TypeVar("_Function", bound=Callable[..., Any])


def without_autocast(function: _Function) -> _Function:
    """Compute in the dtypes of the arguments, inside torch.autocast too.

    A fused op multiplies matrices in forward and again in backward. Autocast would lower only the
    products that run in its region, so the gradient would be that of another function.
    """

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        # Entering two contexts costs host time, and most calls need neither.
        if not (torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")):
            return function(*args, **kwargs)
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            return function(*args, **kwargs)

    return cast("_Function", run)


def needs_graph(*tensors: Tensor | None) -> bool:
    """Whether autograd records operations on any of these: a Function costs ten microseconds."""
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                return True
    return False


def once_differentiable(op: str) -> Callable[[_Function], _Function]:
    """Decorate a Function's backward whose result autograd cannot differentiate.

    Kernels are invisible to autograd: with create_graph=True it would treat their results as
    constants, and a second derivative would silently lack terms. torch's decorator of this name
    cannot prevent that where no incoming gradient requires grad, as in `out.sum()`, nor in
    torch.autograd.grad, which skips nodes that do not lead to its inputs.

    Args:
        op: names the op in the KernelError that a backward with create_graph=True raises.
    """

    def decorate(backward: _Function) -> _Function:
        compute = without_autocast(backward)

        @functools.wraps(backward)
        def run(ctx: Any, *gradients: Tensor | None) -> Any:
            # Under torch.compile the mode has no meaning; it does not support second derivatives.
            if torch.is_grad_enabled() and not torch.compiler.is_compiling():
                raise KernelError(
                    f"{op}: backward got create_graph=True; expected first derivatives only, "
                    "because autograd cannot differentiate a kernel's gradient; compose the "
                    "function of torch's own operations instead"
                )
            return compute(ctx, *gradients)

        return cast("_Function", run)

    return decorate
