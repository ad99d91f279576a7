"""Copy host values to the device: one copy per micro-batch, on a separate stream, ahead of use.

A copy from pageable memory blocks the host until the device has finished all earlier work, and one
on the compute stream waits for earlier computation. Here the host's values are packed into one
pinned block, which one copy transfers while an earlier micro-batch is computed. On a CPU the values
are used in place.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar

import numpy as np
import torch

Value = TypeVar("Value")

_ALIGNMENT = 128
"""Alignment in bytes of tensors in a block."""


def map_tensors(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """Return a copy of a value with every tensor mapped, inside dataclasses, tuples and mappings
    too."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if is_dataclass(value) and not isinstance(value, type):
        named = {field.name: getattr(value, field.name) for field in fields(value)}
        return replace(value, **{k: map_tensors(v, change) for k, v in named.items()})
    if isinstance(value, Mapping):
        return {name: map_tensors(item, change) for name, item in value.items()}
    if isinstance(value, tuple):
        items = [map_tensors(item, change) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    return value


def staging_block(num_bytes: int, device: torch.device) -> torch.Tensor:
    """Return [num_bytes] uint8 on the host, from which a copy to the device does not block the
    host."""
    # The allocator reuses the memory only after the copies from it are done.
    return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=device.type == "cuda")


def on_device(value: Value, device: torch.device) -> Value:
    """Return a value with its tensors on the device, contiguous; does not wait.

    Args:
        value: its tensors are on the host. One that occurs twice stays shared in the result.
        device: target device, reached in one copy of one block; for a CPU only non-contiguous
            tensors are copied.
    """
    found: dict[int, torch.Tensor] = {}
    compact = map_tensors(value, lambda x: found.setdefault(id(x), x.contiguous()))
    return compact if device.type == "cpu" else in_one_block(value, found, device)


def in_one_block(value: Value, tensors: Mapping[int, torch.Tensor], device: torch.device) -> Value:
    """Return a copy of a value on the device through one block.

    Args:
        value: value on the host.
        tensors: its tensors made contiguous, by the `id` of each.
        device: target device.
    """
    found: dict[int, np.ndarray] = {key: x.numpy() for key, x in tensors.items()}
    starts, end = {}, 0
    for key, array in found.items():
        starts[key] = end
        end += -(-array.nbytes // _ALIGNMENT) * _ALIGNMENT
    staged = staging_block(end, device)
    packed = staged.numpy()
    for key, array in found.items():
        packed[starts[key] : starts[key] + array.nbytes] = array.reshape(-1).view(np.uint8)
    block = staged.to(device, non_blocking=True)
    placed: dict[int, torch.Tensor] = {}

    def of_block(x: torch.Tensor) -> torch.Tensor:
        if id(x) not in placed:
            start = starts[id(x)]
            part = block[start : start + found[id(x)].nbytes]
            placed[id(x)] = part.view(x.dtype).view(x.shape)
        return placed[id(x)]

    return map_tensors(value, of_block)


class SideStream:
    """A stream that prepares values for the compute stream; on a CPU nothing is asynchronous.

    Args:
        device: CUDA or a CPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def make(self, value_of: Callable[[], Value]) -> Callable[[], Value]:
        """Enqueue the preparation of a value; the result makes it available to the then current
        stream."""
        with self._current():
            value = value_of()
        made_on = self._stream
        done = made_on.record_event() if made_on else None

        def taken() -> Value:
            if made_on is not None and done is not None:
                stream = torch.cuda.current_stream(made_on.device)
                stream.wait_event(done)

                def used_here(x: torch.Tensor) -> torch.Tensor:
                    # Memory of one stream that another uses must not be reused before it is done.
                    x.record_stream(stream)
                    return x

                map_tensors(value, used_here)
            return value

        return taken

    def _current(self) -> AbstractContextManager[Any]:
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)
