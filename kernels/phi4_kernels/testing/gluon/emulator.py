"""Runs Gluon kernels for Hopper on the CPU, and checks their numbers and synchronisation.

Triton's interpreter does not support Gluon. The emulator runs a kernel's own Python, program after
program, with `gl`, `mbarrier`, `tma` and the warpgroup products replaced: layouts are ignored (the
compiler checks them), and every asynchronous operation goes through a Machine, which reports races,
deadlocks, wrong byte counts and early uses. It covers only what the kernels here use; anything else
raises.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from types import FunctionType
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonJITFunction
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from phi4_kernels import dispatch, launch, registry
from phi4_kernels.dispatch import Choice
from phi4_kernels.testing.gluon.language import KERNEL_MARK, replacements
from phi4_kernels.testing.gluon.machine import Machine, Schedule
from phi4_kernels.testing.gluon.values import Descriptor, Pointer, Value


def _rewritten(kernel: GluonJITFunction, machine: Machine) -> FunctionType:
    """The kernel's function, with its globals replaced; so are those of the functions it calls."""
    stand_ins, modules = replacements(machine), {}

    def rewrite(function: GluonJITFunction) -> FunctionType:
        source = function.fn.__globals__
        # Functions of one file share their globals, rewritten once; the dict is filled before its
        # functions are rewritten, which may call each other.
        if id(source) not in modules:
            modules[id(source)] = module = {KERNEL_MARK: True}
            for name, value in source.items():
                if isinstance(value, GluonJITFunction):
                    value = rewrite(value)
                # On the CPU a constexpr is a plain number.
                elif isinstance(value, gl.constexpr):
                    value = value.value
                module[name] = stand_ins.get(id(value), value)
        return FunctionType(function.fn.__code__, modules[id(source)], function.fn.__name__)

    return rewrite(kernel)


def _argument(value: Any) -> Any:
    if isinstance(value, TensorDescriptor):
        return Descriptor(value)
    if isinstance(value, Tensor):
        return Pointer.of(value)
    # Numbers are int32 tensors, as on the device, and overflow like them.
    if isinstance(value, int) and not isinstance(value, bool):
        return Value(torch.tensor(value, dtype=torch.int32))
    return value


def _run(
    schedule: Schedule, kernel: GluonJITFunction, *args: Any, grid: Any, **options: Any
) -> None:
    """One launch: every program of the grid, one after another."""
    names = [parameter.name for parameter in kernel.params]
    given = dict(zip(names, args, strict=False))
    given |= {name: value for name, value in options.items() if name in names}
    constant = {parameter.name for parameter in kernel.params if parameter.is_constexpr}
    given = {k: value if k in constant else _argument(value) for k, value in given.items()}
    programs = list(range(grid[0]))
    # Programs must not depend on their order, either.
    if schedule.order == "reversed":
        programs.reverse()
    elif schedule.order == "shuffled":
        random.Random(schedule.seed).shuffle(programs)
    for program in programs:
        machine = Machine(schedule, program, grid[0])
        _rewritten(kernel, machine)(**given)
        machine.finish()


@contextmanager
def emulating(schedule: Schedule | None = None, num_processors: int = 2) -> Iterator[None]:
    """Emulate every launch of a Gluon kernel inside, and let `gluon` be named for CPU tensors.

    Args:
        schedule: chooses among several possible steps.
        num_processors: of the emulated device; persistent kernels launch one program on each.
    """
    genuine = dispatch.choose

    def choose(
        op: str,
        requested: str,
        device: torch.device,
        step: str | None = None,
        needs: tuple[str, ...] = (),
    ) -> Choice:
        is_ours = requested == "gluon" and registry.provides(op, "gluon", step)
        if is_ours and device.type == "cpu":
            return Choice(op, "gluon", "named; emulated on the CPU")
        return genuine(op, requested, device, step, needs)

    def run(self: GluonJITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        _run(schedule or Schedule(), self, *args, grid=grid, **options)

    with (
        mock.patch.object(GluonJITFunction, "run", run),
        mock.patch.object(dispatch, "choose", choose),
        mock.patch.object(launch, "_INTERPRETED_PROCESSORS", num_processors),
    ):
        yield
