"""Values of an emulated kernel: tensors and scalars with the arithmetic of the hardware's integers,
pointers with bounds checks, descriptors that return zeros outside of their tensor.
"""

import operator
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl

from phi4_kernels.errors import GateError

_DTYPES = {
    gl.bfloat16: torch.bfloat16,
    gl.float16: torch.float16,
    gl.float32: torch.float32,
    gl.int32: torch.int32,
    gl.int64: torch.int64,
    gl.int1: torch.bool,
}


def torch_dtype(dtype: Any) -> torch.dtype:
    """torch's name of a Gluon dtype, or of one that already is torch's."""
    return dtype if isinstance(dtype, torch.dtype) else _DTYPES[dtype]


def plain(value: Any) -> Any:
    """The torch tensor or Python number inside; a product in flight raises."""
    return getattr(value, "tensor", value)


class Value:
    """A tensor or a scalar in registers."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype

    @property
    def shape(self) -> list[int]:
        return list(self.tensor.shape)

    def to(self, dtype: Any) -> "Value":
        """Rounded to nearest, ties to even, as the hardware's conversions are."""
        return Value(self.tensor.to(torch_dtype(dtype)))

    def __getitem__(self, index: Any) -> "Value":
        return Value(self.tensor[index])

    def __index__(self) -> int:
        return int(self.tensor)

    def __bool__(self) -> bool:
        return bool(self.tensor)

    def __neg__(self) -> "Value":
        return Value(-self.tensor)


def _divide(a: Any, b: Any) -> Tensor:
    return torch.div(torch.as_tensor(a), torch.as_tensor(b), rounding_mode="trunc")


def _binary(operation: Callable[..., Any]) -> tuple[Callable[..., Any], Callable[..., Any]]:
    def forward(self: Value, other: Any) -> Any:
        # int + pointer is the pointer's own addition.
        if isinstance(other, Pointer):
            return NotImplemented
        return Value(operation(self.tensor, plain(other)))

    def reflected(self: Value, other: Any) -> Value:
        return Value(operation(torch.as_tensor(plain(other)), self.tensor))

    return forward, reflected


# Integer division and remainder round toward zero, unlike Python's.
_OPERATIONS = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "truediv": operator.truediv,
    "floordiv": _divide,
    "mod": lambda a, b: torch.fmod(torch.as_tensor(a), torch.as_tensor(b)),
    "and": operator.and_,
    "or": operator.or_,
    "xor": operator.xor,
}
for _name, _operation in _OPERATIONS.items():
    _forward, _reflected = _binary(_operation)
    setattr(Value, f"__{_name}__", _forward)
    setattr(Value, f"__r{_name}__", _reflected)
for _name in ("lt", "le", "gt", "ge", "eq", "ne"):
    setattr(Value, f"__{_name}__", _binary(getattr(operator, _name))[0])


class Pointer:
    """Elements of a tensor's memory by offset; leaving the tensor's span is an error."""

    def __init__(self, elements: Tensor, offset: Any = 0) -> None:
        self.elements, self.offset = elements, offset

    @classmethod
    def of(cls, tensor: Tensor) -> "Pointer":
        """The first element of a tensor."""
        sizes = zip(tensor.shape, tensor.stride(), strict=True)
        span = 1 + sum((n - 1) * s for n, s in sizes) if tensor.numel() else 0
        return cls(tensor.detach().as_strided((span,), (1,)))

    def __add__(self, offset: Any) -> "Pointer":
        return Pointer(self.elements, self.offset + plain(offset))

    __radd__ = __add__

    def load(self, mask: Any, other: Any) -> Value:
        """Elements where the mask holds, `other` elsewhere."""
        index, keep = self._inside(mask)
        loaded = self.elements[torch.where(keep, index, 0)]
        return Value(torch.where(keep, loaded, 0 if other is None else plain(other)))

    def store(self, value: Any, mask: Any) -> None:
        """Write where the mask holds."""
        index, keep = self._inside(mask)
        value = torch.as_tensor(plain(value), dtype=self.elements.dtype).expand(index.shape)
        self.elements[index[keep]] = value[keep]

    def _inside(self, mask: Any) -> tuple[Tensor, Tensor]:
        index = torch.as_tensor(self.offset).long()
        keep = torch.as_tensor(True if mask is None else plain(mask)).expand(index.shape)
        used = index[keep]
        if used.numel() and not 0 <= int(used.min()) <= int(used.max()) < len(self.elements):
            raise GateError(
                f"offsets {int(used.min())} to {int(used.max())} of a tensor of "
                f"{len(self.elements)} elements; expected all inside; check mask and strides"
            )
        return index, keep


@dataclass(frozen=True)
class Descriptor:
    """The copy engine's view of a tensor; see TensorDescriptor."""

    host: Any

    @cached_property
    def dtype(self) -> torch.dtype:
        return self.host.base.dtype

    @property
    def layout(self) -> Any:
        return self.host.layout

    @cached_property
    def block_type(self) -> SimpleNamespace:
        shape = list(self.host.block_shape)
        return SimpleNamespace(shape=shape, nbytes=torch.Size(shape).numel() * self.dtype.itemsize)

    def block(self, corner: list[int]) -> Tensor:
        """The block at a corner; zeros where it leaves the tensor. All its bytes count."""
        host = self.host
        values = torch.zeros(self.block_type.shape, dtype=self.dtype)
        sizes = zip(corner, host.block_shape, host.shape, strict=True)
        spans = [(max(at, 0), min(at + size, limit), at) for at, size, limit in sizes]
        if all(first < last for first, last, _ in spans):
            source = host.base.detach().as_strided(tuple(host.shape), tuple(host.strides))
            source = source[tuple(slice(first, last) for first, last, _ in spans)]
            values[tuple(slice(first - at, last - at) for first, last, at in spans)] = source
        return values
