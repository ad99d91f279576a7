"""From the host to the device: one copy per micro-batch, on a stream of its own, ahead of its turn.

A copy from pageable memory holds the host until the device has done everything before it, and one
on the stream that computes waits for what was computed. Here the host's values are packed into one
pinned block, which one copy moves while an earlier micro-batch is computed. A CPU computes on them
where they are.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar

import numpy as np
import torch

Value = TypeVar("Value")

_ALIGNMENT = 128
"""Bytes between places where a tensor of a block may begin."""


def map_tensors(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """A copy of a value with every tensor changed, inside dataclasses, tuples and mappings too."""
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
    """[num_bytes] uint8 on the host, from which a copy to the device does not hold the host."""
    # The allocator gives the memory away again only once the copies from it are done.
    return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=device.type == "cuda")


def on_device(value: Value, device: torch.device) -> Value:
    """A value whose tensors are on the device, contiguous; waits for nothing.

    Args:
        value: its tensors are on the host. One that occurs twice is one in the result too.
        device: where to, in one copy of one block; for a CPU only what has gaps is copied.
    """
    found: dict[int, torch.Tensor] = {}
    compact = map_tensors(value, lambda x: found.setdefault(id(x), x.contiguous()))
    return compact if device.type == "cpu" else in_one_block(value, found, device)


def in_one_block(value: Value, tensors: Mapping[int, torch.Tensor], device: torch.device) -> Value:
    """A copy of a value on the device by a block.

    Args:
        value: on the host.
        tensors: those of the value made contiguous, by the `id` of each.
        device: where to.
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
    """Where values are made for the stream that computes; on a CPU nothing is asynchronous.

    Args:
        device: CUDA or a CPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def make(self, value_of: Callable[[], Value]) -> Callable[[], Value]:
        """Enqueue what makes a value; the result gives it to the stream that is current then."""
        with self._current():
            value = value_of()
        made_on = self._stream
        done = made_on.record_event() if made_on else None

        def taken() -> Value:
            if made_on is not None and done is not None:
                stream = torch.cuda.current_stream(made_on.device)
                stream.wait_event(done)

                def used_here(x: torch.Tensor) -> torch.Tensor:
                    # Memory of one stream that another uses: not reused before that is done, too.
                    x.record_stream(stream)
                    return x

                map_tensors(value, used_here)
            return value

        return taken

    def _current(self) -> AbstractContextManager[Any]:
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)
