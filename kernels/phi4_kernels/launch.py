"""Launch ladders: tables of launch parameters by size, which a developer edits.

A ladder is data, so that the resource gate can compile every row of it and report a row that no
case reaches. The choice depends on sizes only, never on a timing, so that two runs launch alike.
"""

from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from phi4_kernels.errors import ImplementationError

# Programs on a device without multiprocessors: small, so that loops over rows run more than once.
_INTERPRETED_PROCESSORS = 2


@dataclass(frozen=True, slots=True)
class Launch:
    """One row of a ladder: it serves every size up to `limit`."""

    limit: int
    """Largest size (unit: see the ladder) that this row serves."""
    block: int
    """Elements of the last dimension that a program handles at a time; a power of two."""
    num_warps: int
    rows: int = 1
    """Rows (tokens) that a program handles at a time."""
    programs_per_processor: int = 0
    """Resident programs per multiprocessor of a persistent kernel; 0 where the grid is the data."""


Ladder = tuple[Launch, ...]


class _LadderRow(Protocol):
    @property
    def limit(self) -> int: ...


Row = TypeVar("Row", bound=_LadderRow)


def pick(ladder: tuple[Row, ...], size: int) -> Row:
    """The first row of `ladder` that serves `size`.

    Raises:
        ImplementationError: no row serves it.
    """
    for row in ladder:
        if size <= row.limit:
            return row
    raise ImplementationError(
        f"size {size} is over the launch ladder's last row, {ladder[-1].limit}; "
        "use implementation='torch' or add a row"
    )


def persistent_programs(per_processor: int, num_items: int, device: torch.device) -> int:
    """Programs of a kernel that loops over `num_items`: at most as many as fill the device."""
    processors = _INTERPRETED_PROCESSORS
    if device.type == "cuda":
        processors = torch.cuda.get_device_properties(device).multi_processor_count
    # More programs than items would be idle.
    return min(num_items, processors * max(per_processor, 1))


def divisor_block(width: int, largest: int, smallest: int) -> int:
    """The largest power of two <= `largest` that divides `width` (no masks), or `largest` cut to
    the next power of two of `width` where only blocks under `smallest` divide it."""
    block = largest
    while block > smallest and width % block:
        block //= 2
    return block if width % block == 0 else min(largest, 1 << max(width - 1, 1).bit_length())


def ceil_div(a: int, b: int) -> int:
    """a / b rounded up."""
    return -(-a // b)


def row_stride(tensor: Tensor) -> int:
    """Stride of the rows of a [T, H] tensor, in elements."""
    return tensor.stride(0)
