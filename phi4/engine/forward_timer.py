"""Measure the time of a rank's own chunks in the forward passes of a training step.

Waiting for another pipeline stage is excluded: megatron-core receives before and sends after. The
collectives of the layers are included, so the ranks of one tensor or context group wait for each
other inside and measure about the same.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_Events = list[tuple[torch.cuda.Event, torch.cuda.Event]]


class ForwardTimer:
    """Sums the forward passes of a step; never synchronises with the device.

    Args:
        device: CUDA uses events; a CPU the processor time of the training thread, which other
            programs on a shared core do not lengthen as they do the wall clock.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_cuda = device.type == "cuda"
        self._seconds = 0.0
        self._events: _Events = []
        self._events_before: _Events = []

    @contextmanager
    def measured(self) -> Iterator[None]:
        """Measure one forward pass; those without gradients are ignored."""
        if not torch.is_grad_enabled():
            yield
        elif self._on_cuda:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            yield
            end.record()
            self._events.append((begin, end))
        else:
            begun = time.thread_time()
            yield
            self._seconds += time.thread_time() - begun

    def next_step(self) -> float | None:
        """End a step; return the seconds of its forward passes, or on CUDA those of the previous
        step.

        None if the device has not finished them yet.
        """
        if not self._on_cuda:
            seconds, self._seconds = self._seconds, 0.0
            return seconds
        events, self._events_before, self._events = self._events_before, self._events, []
        if not events or not all(end.query() for _, end in events):
            return None
        return sum(begin.elapsed_time(end) for begin, end in events) / 1000
