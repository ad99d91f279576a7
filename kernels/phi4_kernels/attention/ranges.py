"""Which keys each query may see: ranges of queries, each with its range of keys.

One description serves packed documents (queries and keys are the same tokens), the pieces of a
context-parallel rank (fewer queries than keys) and decoding with a cache. It holds tensors on the
device of the data; the two maxima are host integers, which avoids a synchronisation.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from phi4_kernels.attention.once import once
from phi4_kernels.checks import expect_same_device, vector
from phi4_kernels.errors import PositionError, ShapeError


@dataclass(frozen=True, slots=True, eq=False)
class Ranges:
    """Range i: queries [q_offsets[i], q_offsets[i + 1]) see keys of [k_starts[i], k_ends[i]).

    Query ranges follow each other without gaps. Key ranges are in order and disjoint, and may
    leave gaps and be empty. Tokens outside of all ranges are allowed: such a query sees nothing.

    Create one per micro-batch: implementations derive tables from it once and keep them as long as
    it exists. Code that overwrites boundaries without PyTorch noticing (a foreign kernel, `.data`,
    the replay of a CUDA graph) must create a new Ranges.
    """

    q_offsets: Tensor
    """[n + 1], int32, ascending."""
    k_starts: Tensor
    """[n], int32."""
    k_ends: Tensor
    """[n], int32."""
    max_queries: int
    """Upper bound of the queries per range; a loose bound may select a less suitable launch row."""
    max_keys: int
    """Upper bound of the keys per range."""
    num_tokens: int | None = None
    """Number of tokens, if the ranges are adjacent documents from token 0 that cover all queries
    and keys; None if the host does not know that. Some implementations serve nothing else."""

    def __post_init__(self) -> None:
        if self.q_offsets.dim() != 1 or not self.q_offsets.numel():
            raise ShapeError(
                f"Ranges: q_offsets has shape {tuple(self.q_offsets.shape)}; expected "
                "[ranges + 1]; for one range pass [0, num_queries]"
            )
        num_ranges = self.q_offsets.numel() - 1
        sides = (
            ("q_offsets", num_ranges + 1, "one offset per range and the end"),
            ("k_starts", num_ranges, "one start per range"),
            ("k_ends", num_ranges, "one end per range"),
        )
        for name, length, remedy in sides:
            side = vector("Ranges", name, getattr(self, name), length, (torch.int32,), remedy)
            object.__setattr__(self, name, side)
        expect_same_device(
            "Ranges", q_offsets=self.q_offsets, k_starts=self.k_starts, k_ends=self.k_ends
        )
        # A tensor object that only this Ranges has: the key of its derived tables; see once.py.
        object.__setattr__(self, "q_offsets", self.q_offsets.view(-1))

    @classmethod
    def packed(cls, cu_seqlens: Tensor, max_length: int, num_tokens: int | None = None) -> "Ranges":
        """Self attention over packed documents.

        Args:
            cu_seqlens: [documents + 1], int32, from 0, ascending.
            max_length: at least the tokens of the longest document.
            num_tokens: the last of cu_seqlens, if the host knows it.
        """
        sides = cu_seqlens, cu_seqlens[:-1], cu_seqlens[1:]
        return cls(*sides, max_length, max_length, num_tokens)

    @classmethod
    def of(
        cls,
        q_offsets: Sequence[int],
        k_starts: Sequence[int],
        k_ends: Sequence[int],
        device: torch.device | str | None = None,
    ) -> "Ranges":
        """Ranges of host values, on `device` or torch's default.

        Raises:
            ShapeError: the lists differ in length.
            PositionError: they are not in order, or key ranges overlap.
        """
        offsets, starts, ends = (
            torch.tensor(list(part), dtype=torch.int32, device="cpu")
            for part in (q_offsets, k_starts, k_ends)
        )
        # Checked on the host, before anything is on the device.
        cls(offsets, starts, ends, 0, 0).validate()
        most, most_keys = (
            int(part.max()) if part.numel() else 0 for part in (offsets.diff(), ends - starts)
        )
        num_tokens = _num_tokens(offsets, starts, ends)
        device = torch.get_default_device() if device is None else device
        offsets, starts, ends = (part.to(device) for part in (offsets, starts, ends))
        return cls(offsets, starts, ends, most, most_keys, num_tokens)

    def validate(self, num_queries: int | None = None, num_keys: int | None = None) -> None:
        """Raise PositionError unless ranges are ascending and in range; synchronises."""
        spans = once((self.q_offsets, self.k_starts, self.k_ends), ("spans",), self._spans)
        for (name, first, last), limit in zip(spans, (num_queries, num_keys), strict=True):
            if first < 0 or (limit is not None and last > limit):
                raise PositionError(
                    f"Ranges: {name} span {first} to {last}; expected within 0 to "
                    f"{'...' if limit is None else limit}; fix the boundaries or pass all tokens"
                )

    def _spans(self) -> list[tuple[str, int, int]]:
        """Name, start and end of the spans of queries and keys; 0 and 0 without ranges."""
        keys = zip(self.k_starts.tolist(), self.k_ends.tolist(), strict=True)
        # Starts and ends in turn ascend exactly if ranges are in order and do not overlap.
        edges = [edge for pair in keys for edge in pair]
        spans = []
        for name, values in (("q_offsets", self.q_offsets.tolist()), ("key ranges", edges)):
            if values != sorted(values):
                raise PositionError(
                    f"Ranges: {name} run {_first_descent(values)}; expected ascending, without "
                    "overlap; sort the documents"
                )
            spans.append((name, values[0], values[-1]) if values else (name, 0, 0))
        found = _num_tokens(self.q_offsets, self.k_starts, self.k_ends)
        if self.num_tokens not in (None, found):
            raise PositionError(
                f"Ranges: num_tokens is {self.num_tokens}; expected documents side by side from "
                "token 0 that hold as many; leave it out for other ranges"
            )
        return spans


def _num_tokens(q_offsets: Tensor, k_starts: Tensor, k_ends: Tensor) -> int | None:
    """See Ranges.num_tokens; reads the boundaries."""
    begins, ends = q_offsets[:-1], q_offsets[1:]
    # Documents side by side: queries and keys of each are the same tokens, from token 0 on.
    if q_offsets[0] or not (torch.equal(begins, k_starts) and torch.equal(ends, k_ends)):
        return None
    return int(q_offsets[-1])


def _first_descent(values: list[int]) -> str:
    at = next(i for i in range(1, len(values)) if values[i] < values[i - 1])
    return f"{values[at - 1]}, {values[at]} at index {at}"
