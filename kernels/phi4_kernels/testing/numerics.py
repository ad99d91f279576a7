"""Runs one case of one entry and checks every output and gradient by the error rule."""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from phi4_kernels import dispatch, interpreter, registry
from phi4_kernels.errors import GateError
from phi4_kernels.registry import CallInputs, Case, Entry
from phi4_kernels.testing import error_rule, random_inputs
from phi4_kernels.testing.error_rule import Margin
from phi4_kernels.testing.poison import poisoned

Results = dict[str, Tensor]


def _convert(value: Any, convert: Callable[[Tensor], Tensor]) -> Any:
    return convert(value) if isinstance(value, Tensor) else value


def converted(inputs: CallInputs, convert: Callable[[Tensor], Tensor]) -> CallInputs:
    """The inputs with every tensor converted."""
    return CallInputs(
        {name: convert(tensor) for name, tensor in inputs.tensors.items()},
        {name: _convert(value, convert) for name, value in inputs.constants.items()},
    )


def doubled(tensor: Tensor) -> Tensor:
    """The tensor in fp64 where it holds floats."""
    return tensor.double() if tensor.is_floating_point() else tensor


def outputs_of(result: Any) -> tuple[Tensor, ...]:
    """The outputs of an entry's function as a tuple."""
    return (result,) if isinstance(result, Tensor) else tuple(result)


def evaluate(
    function: Callable[..., Any],
    inputs: CallInputs,
    gradients: tuple[Tensor, ...] | None,
    place: Callable[[Tensor], Tensor] = Tensor.clone,
) -> Results:
    """Run forward, and backward when gradients are given.

    Args:
        function: called with the inputs.
        inputs: arguments of the function.
        gradients: one per output, of its dtype; None for functions without autograd.
        place: copies a tensor to the device and memory that the function uses.

    Returns:
        Outputs as out0, out1, ... and gradients as d_<input>.
    """
    leaves = {name: place(tensor).detach() for name, tensor in inputs.tensors.items()}
    for leaf in leaves.values():
        leaf.requires_grad_(gradients is not None)
    constants = {name: _convert(value, place) for name, value in inputs.constants.items()}
    outputs = outputs_of(function(**leaves, **constants))
    results = {f"out{index}": output for index, output in enumerate(outputs)}
    if gradients is not None:
        torch.autograd.backward(outputs, [place(gradient) for gradient in gradients])
        for name, leaf in leaves.items():
            assert leaf.grad is not None, f"{name} has no gradient"
            results[f"d_{name}"] = leaf.grad
    return {name: tensor.detach() for name, tensor in results.items()}


def incoming(entry: Entry, case: Case, inputs: CallInputs) -> tuple[Tensor, ...] | None:
    """Random gradients of the entry's outputs, one per output; None without autograd."""
    if not entry.differentiable:
        return None
    # Shapes and dtypes of the outputs are taken from the reference, not from the kernel.
    outputs = outputs_of(entry.reference(**inputs.tensors, **inputs.constants))
    generator = case.generator()
    return tuple(
        random_inputs.rows(
            tuple(output.shape),
            output.dtype,
            generator,
            high=random_inputs.gradient_high(output.dtype),
            strided=case.strided,
        )
        for output in outputs
    )


def run(
    entry: Entry, case: Case, dtype: torch.dtype, implementation: str, device: str = "cpu"
) -> tuple[Results, Callable[[], Results]]:
    """Run a case in poisoned memory; returns results and a function that repeats it unpoisoned."""
    inputs = entry.make(case, dtype)
    gradients = incoming(entry, case, inputs)
    function = partial(entry.function, implementation=implementation)
    move = partial(copied, device=device)
    moved = converted(inputs, move)
    arriving = None if gradients is None else tuple(move(gradient) for gradient in gradients)
    # Inputs between bands, outputs full of NaN: an element left out or written past an end shows.
    with poisoned() as guard:
        results = evaluate(function, moved, arriving, guard.guarded)
        guard.verify()
    return results, partial(evaluate, function, moved, arriving, copied)


def copied(tensor: Tensor, device: torch.device | str | None = None) -> Tensor:
    """A copy with the same strides, by default on the same device."""
    to = tensor.device if device is None else device
    copy = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=to)
    return copy.copy_(tensor.detach())


def check(
    entry: Entry,
    case: Case,
    dtype: torch.dtype,
    implementation: str = "triton",
    device: str = "cpu",
) -> dict[str, Margin]:
    """Numbers by the error rule, memory by guard bands, and equal bits in every program order,
    unless the implementation is declared as not deterministic.

    Raises:
        GateError: any of them fails.
    """
    inputs = entry.make(case, dtype)
    gradients = incoming(entry, case, inputs)
    eager = evaluate(entry.reference, inputs, gradients)
    # Truth is the reference in fp64, of the same rounded inputs and incoming gradients.
    truth = evaluate(
        entry.reference,
        converted(inputs, doubled),
        None if gradients is None else tuple(gradient.double() for gradient in gradients),
    )
    ours, again = run(entry, case, dtype, implementation, device)
    margins = {
        name: error_rule.check(f"{entry.name}/{case.name} {name}", ours[name], eager[name], exact)
        for name, exact in truth.items()
    }
    if not registry.is_deterministic(entry.op, implementation):
        return margins
    # A GPU runs programs in no fixed order; the interpreter runs them in three orders.
    interpreted = implementation == "triton" and dispatch.interpreting()
    for order in interpreter.ORDERS[1:] if interpreted else ("forward",):
        with interpreter.program_order(order) if interpreted else nullcontext():
            expect_same_bits(f"{entry.name}/{case.name} {order}", ours, again())
    return margins


def _bits(tensor: Tensor) -> Tensor:
    # Bits, because NaN equals nothing and -0 equals 0.
    return tensor.flatten().view(torch.uint8)


def expect_same_bits(name: str, first: Results, second: Results) -> None:
    """Raise GateError unless both runs agree in every bit."""
    for key, tensor in first.items():
        other = second[key]
        same = torch.equal(_bits(tensor), _bits(other))
        if not same:
            raise GateError(
                f"{name} {key}: two runs differ; expected equal bits; look for atomics, races or "
                "reads of unwritten memory"
            )
