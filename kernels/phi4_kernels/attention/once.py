"""Caches what an implementation derives from a Ranges, once for all layers and passes.

An operator takes tensors, not a Ranges. A Ranges therefore has its own `q_offsets` tensor object,
and cached results are kept as long as that object exists.
"""

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary


@dataclass(slots=True)
class _Derived:
    """Cached results of one Ranges."""

    versions: tuple[int, ...]
    """Version counters of its tensors, which count the writes known to PyTorch."""
    values: dict[Hashable, Any] = field(default_factory=dict)


_T = TypeVar("_T")
_derived: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def once(
    boundaries: tuple[Tensor, Tensor, Tensor],
    settings: tuple[Hashable, ...],
    make: Callable[[], _T],
) -> _T:
    """`make()`, or its result of an earlier call with these boundaries and settings.

    While a CUDA graph is being captured, nothing is reused: a replay must derive the result from
    the boundaries at replay time, not from those before the capture.

    Args:
        boundaries: q_offsets, k_starts and k_ends of a Ranges.
        settings: other values that the result depends on.
        make: derives it by kernels on the current stream.
    """
    q_offsets = boundaries[0]
    if _is_capturing(q_offsets):
        return make()
    # Inference tensors have no version counter.
    versions = tuple(0 if x.is_inference() else x._version for x in boundaries)
    derived = _derived.get(q_offsets)
    # Boundaries that were overwritten need a new table.
    if derived is None or derived.versions != versions:
        _derived[q_offsets] = derived = _Derived(versions)
    # Kernels of another stream would not wait for what this one makes.
    key = (*settings, _stream(q_offsets))
    if key not in derived.values:
        derived.values[key] = make()
    return derived.values[key]


def _is_capturing(tensor: Tensor) -> bool:
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def _stream(tensor: Tensor) -> int:
    return torch.cuda.current_stream(tensor.device).cuda_stream if tensor.is_cuda else 0
