"""Replacements of `gl`, `mbarrier`, `tma` and the warpgroup products for an emulated kernel."""

import linecache
import math
import re
import sys
from collections.abc import Iterator
from functools import partial
from types import FrameType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper

from phi4_kernels.errors import GateError
from phi4_kernels.testing.gluon.machine import Machine
from phi4_kernels.testing.gluon.state import Barrier, Product, Region
from phi4_kernels.testing.gluon.values import Descriptor, Pointer, Value, plain, torch_dtype

KERNEL_MARK = "emulated:"
"""A name in the globals of emulated functions, by which their frames are known."""
_COPY_BYTES = 16
"""Alignment of a copy's address. Strides are aligned, so only the last coordinate is checked."""


class Accumulator:
    """A product in flight: only warpgroup_mma and warpgroup_mma_wait may use it."""

    def __init__(self, result: Tensor, product: Product) -> None:
        self._result, self._product = result, product

    def __getattr__(self, name: str) -> Any:
        raise GateError(
            f"the product at {self._product.where} is used ({name}) in flight; expected the result "
            "of warpgroup_mma_wait; pass it through deps"
        )

    def finished(self) -> Value:
        """The result, once waited for."""
        if not self._product.done:
            raise GateError(
                f"warpgroup_mma_wait returns the product at {self._product.where}, which is in "
                "flight; expected fewer outstanding; lower num_outstanding"
            )
        return Value(self._result)


class Shared:
    """Shared memory, or a view of it; a region is what `index` selects."""

    def __init__(self, machine: Machine, data: Tensor, name: str, parts: dict[int, Region]) -> None:
        self._machine, self.data, self._name, self._parts = machine, data, name, parts

    @property
    def shape(self) -> list[int]:
        return list(self.data.shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.data.dtype

    @property
    def region(self) -> Region:
        """The region of this view."""
        if not self._parts:
            self._parts[-1] = self._region(self._name)
        return next(iter(self._parts.values()))

    def index(self, slot: Any) -> "Shared":
        slot = int(plain(slot))
        if not 0 <= slot < len(self.data):
            raise GateError(f"{self._name} has {len(self.data)} slots; got {slot}; check the ring")
        # A slot is a region of its own: slots of a ring are written and released one by one.
        if slot not in self._parts:
            self._parts[slot] = self._region(f"{self._name}[{slot}]")
        return self._view(self.data[slot], {slot: self._parts[slot]})

    def slice(self, start: int, length: int, dim: int = 0) -> "Shared":
        return self._view(self.data.narrow(dim, start, length))

    def reshape(self, shape: list[int]) -> "Shared":
        return self._view(self.data.view(shape))

    def permute(self, order: tuple[int, ...]) -> "Shared":
        return self._view(self.data.permute(order))

    def load(self, layout: Any) -> Value:
        # Copied: a later copy into the slot must not change what was loaded.
        self._machine.read(self.region, _where())
        return Value(self.data.clone())

    def store(self, value: Value) -> None:
        self._machine.write(self.region, _where())
        self.data.copy_(value.tensor)

    def _view(self, data: Tensor, parts: dict[int, Region] | None = None) -> "Shared":
        region = parts or {-1: self.region}
        return Shared(self._machine, data, self._name, region)

    def _region(self, name: str) -> Region:
        region = Region(name)
        self._machine.regions.append(region)
        return region


def _frames() -> Iterator[tuple[str, int, str]]:
    """(function, line number, line) of the kernel's frames, innermost first."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if KERNEL_MARK in frame.f_globals:
            line = linecache.getline(frame.f_code.co_filename, frame.f_lineno)
            yield frame.f_code.co_name, frame.f_lineno, line
        frame = frame.f_back


def _where() -> str:
    """Current function and line of the kernel."""
    name, number, _ = next(_frames(), ("?", 0, ""))
    return f"{name}:{number}"


def _assigned_name() -> str:
    """Names that the kernel gives to the value being created, outermost function first."""
    targets = [re.match(r"\s*(\w+)(?:: [\w.]+)? = ", line) for _, _, line in _frames()]
    return ".".join(match[1] for match in reversed(targets) if match) or "memory"


class _Language:
    """`gl` of an emulated kernel; other attributes (layouts, dtypes) come from the real module."""

    static_range = staticmethod(range)

    def __init__(self, machine: Machine) -> None:
        self._machine = machine

    def __getattr__(self, name: str) -> Any:
        return getattr(gl, name)

    def program_id(self, axis: int) -> Value:
        return Value(torch.tensor(self._machine.program, dtype=torch.int32))

    def num_programs(self, axis: int) -> Value:
        return Value(torch.tensor(self._machine.grid, dtype=torch.int32))

    def load(self, ptr: Pointer, mask: Any = None, other: Any = None) -> Value:
        return ptr.load(mask, other)

    def store(self, ptr: Pointer, value: Any, mask: Any = None) -> None:
        ptr.store(value, mask)

    def arange(self, start: int, end: int, layout: Any = None) -> Value:
        return Value(torch.arange(start, end, dtype=torch.int32))

    def full(self, shape: list[int], value: Any, dtype: Any, layout: Any = None) -> Value:
        return Value(torch.full(tuple(shape), plain(value), dtype=torch_dtype(dtype)))

    def zeros(self, shape: list[int], dtype: Any, layout: Any = None) -> Value:
        return self.full(shape, 0, dtype)

    def zeros_like(self, value: Value) -> Value:
        return Value(torch.zeros_like(value.tensor))

    def where(self, condition: Any, a: Any, b: Any) -> Value:
        return Value(torch.where(torch.as_tensor(plain(condition)), plain(a), plain(b)))

    def minimum(self, a: Any, b: Any) -> Value:
        # fmin and fmax pass over a NaN, as the hardware's min and max do.
        return Value(torch.fmin(*map(torch.as_tensor, (plain(a), plain(b)))))

    def maximum(self, a: Any, b: Any) -> Value:
        return Value(torch.fmax(*map(torch.as_tensor, (plain(a), plain(b)))))

    def cdiv(self, a: Any, b: Any) -> Any:
        return (a + b - 1) // b

    def max(self, value: Value, axis: int) -> Value:
        return Value(value.tensor.amax(axis))

    def sum(self, value: Value, axis: int) -> Value:
        return Value(value.tensor.sum(axis, dtype=value.dtype))

    def exp2(self, value: Value) -> Value:
        return Value(value.tensor.exp2())

    def log2(self, value: Value) -> Value:
        return Value(value.tensor.log2())

    def convert_layout(self, value: Value, layout: Any) -> Value:
        if not isinstance(value, Value):
            raise GateError("convert_layout takes a value; expected one; wait for the product")
        return value

    def allocate_shared_memory(self, dtype: Any, shape: list[int], layout: Any) -> Shared:
        dtype = torch_dtype(dtype)
        # Shared memory is uninitialised: it holds data of the previous program.
        fill = math.nan if dtype.is_floating_point else -1
        data = torch.full(tuple(shape), fill, dtype=dtype)
        return Shared(self._machine, data, _assigned_name(), {})

    def warp_specialize(self, partitions: list, num_warps: list, num_registers: list) -> None:
        functions = [
            (f"{function.__name__.strip('_')} {i}", partial(function, *arguments))
            for i, (function, arguments) in enumerate(partitions)
        ]
        self._machine.specialize(functions)


class _Hopper:
    """Barriers, copies and products of an emulated kernel."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._barriers: dict[int, Barrier] = {}

    def _barrier(self, memory: Shared) -> Barrier:
        region = memory.region
        if id(region) not in self._barriers:
            raise GateError(f"{region.name} is no barrier yet; expected mbarrier.init before")
        return self._barriers[id(region)]

    def init(self, memory: Shared, count: int) -> None:
        self._machine.write(memory.region, _where())
        self._barriers[id(memory.region)] = Barrier(memory.region, count, count)

    def expect(self, memory: Shared, num_bytes: int, pred: Any = True) -> None:
        if pred:
            self._machine.arrive(self._barrier(memory), 1, _where(), num_bytes)

    def arrive(self, memory: Shared, *, count: int = 1, pred: Any = True) -> None:
        if pred:
            self._machine.arrive(self._barrier(memory), count, _where())

    def wait(self, memory: Shared, phase: Any, pred: Any = True, deps: Any = ()) -> None:
        if pred:
            self._machine.wait(self._barrier(memory), int(plain(phase)), _where())

    def copy_in(
        self, descriptor: Descriptor, coord: list, barrier: Shared, result: Shared, pred: Any = True
    ) -> None:
        if not pred:
            return
        corner = [int(plain(at)) for at in coord]
        if corner[-1] * descriptor.dtype.itemsize % _COPY_BYTES:
            raise GateError(
                f"{_where()} copies from {corner}; expected the last coordinate at a multiple of "
                f"{_COPY_BYTES} bytes, or the instruction is illegal; let rows start at such places"
            )
        block = descriptor.block(corner)
        if block.shape != result.data.shape or block.dtype != result.dtype:
            raise GateError(
                f"{_where()} copies {tuple(block.shape)} to {result.shape}; expected equal blocks"
            )
        # Until the copy lands the slot holds neither the old nor the new block.
        result.data.fill_(math.nan)
        # Read when issued, written when the schedule lets it land.
        landing = partial(result.data.copy_, block)
        where, num_bytes = _where(), descriptor.block_type.nbytes
        self._machine.copy(result.region, self._barrier(barrier), num_bytes, landing, where)

    def mma(
        self, a: Any, b: Shared, acc: Any, *, use_acc: Any = True, is_async: bool = False
    ) -> Any:
        product = Product([], _where())
        for operand in (a, b):
            if isinstance(operand, Shared):
                self._machine.read(operand.region, product.where, product)
        left = a.data if isinstance(a, Shared) else a.tensor
        if left.dtype != b.dtype or left.shape[1] != b.data.shape[0]:
            raise GateError(
                f"{product.where}: {tuple(left.shape)} {left.dtype} by {tuple(b.data.shape)} "
                f"{b.dtype}; expected equal dtypes and inner sizes"
            )
        # Computed when issued, as no operand may change while the product is in flight: the machine
        # checks that.
        result = left.float() @ b.data.float()
        if use_acc:
            result += acc._result if isinstance(acc, Accumulator) else acc.tensor
        self._machine.issue(product)
        accumulator = Accumulator(result, product)
        return accumulator if is_async else self.mma_wait(0, (accumulator,))

    def mma_wait(self, num_outstanding: int = 0, deps: Any = None) -> Any:
        self._machine.wait_products(num_outstanding)
        results = [dep.finished() if isinstance(dep, Accumulator) else dep for dep in deps]
        return results[0] if len(results) == 1 else tuple(results)


def replacements(machine: Machine) -> dict[int, Any]:
    """Replacement of each of Gluon's modules and functions, by identity."""
    parts = _Hopper(machine)
    barriers = SimpleNamespace(
        init=parts.init,
        expect=parts.expect,
        arrive=parts.arrive,
        wait=parts.wait,
        MBarrierLayout=hopper.mbarrier.MBarrierLayout,
    )
    return {
        id(gl): _Language(machine),
        id(hopper.mbarrier): barriers,
        id(hopper.tma): SimpleNamespace(async_copy_global_to_shared=parts.copy_in),
        id(hopper.warpgroup_mma): parts.mma,
        id(hopper.warpgroup_mma_wait): parts.mma_wait,
        id(hopper.fence_async_shared): machine.fence,
    }
