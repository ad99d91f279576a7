"""The block table of a paged key-value cache: where the keys of each sequence are.

A cache holds the keys of all sequences, [P, K, D]; a slot holds one token. A block is
`block_tokens` consecutive slots. The blocks of a sequence may be in any order, and sequences may
share blocks. Attention reads them in place, so that nothing is copied when a sequence grows.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate

import torch
from torch import Tensor

from phi4_kernels.attention.once import once
from phi4_kernels.checks import expect_dtype, expect_same_device, vector
from phi4_kernels.errors import PositionError, ShapeError

# Shape legend: n sequences, B columns of a table, P slots.


@dataclass(frozen=True, slots=True, eq=False)
class BlockTable:
    """Queries [q_offsets[i], q_offsets[i + 1]) belong to sequence i, the last ones of its tokens.

    Key j of sequence i is in slot `blocks[i, j // block_tokens] * block_tokens + j % block_tokens`.
    Queries outside of all sequences are allowed: they see nothing.

    Create one per step: implementations derive tables from it once for all layers, as from Ranges.
    """

    q_offsets: Tensor
    """[n + 1], int32, ascending; 0 to n where every sequence has one query."""
    blocks: Tensor
    """[n, B], int32: numbers of blocks; those behind a sequence's last key are not read."""
    lengths: Tensor
    """[n], int32: keys of each sequence, at most B * block_tokens."""
    block_tokens: int
    """Slots of a block; Triton compiles one kernel per size."""
    max_length: int
    """Upper bound of the keys per sequence. On a GPU it sets how many programs share a sequence; a
    value that is too small makes decoding slower, not wrong."""

    def __post_init__(self) -> None:
        expect_dtype("BlockTable", "blocks", self.blocks, (torch.int32,))
        if self.blocks.dim() != 2:
            raise ShapeError(
                f"BlockTable: blocks has shape {tuple(self.blocks.shape)}; expected [sequences, "
                "blocks]; pad the rows to one length"
            )
        if self.block_tokens < 1:
            raise ShapeError(
                f"BlockTable: block_tokens is {self.block_tokens}; expected 1 or more; pass the "
                "cache's"
            )
        num_sequences = self.blocks.shape[0]
        sides = (
            ("q_offsets", num_sequences + 1, "one offset per row of blocks and the end"),
            ("lengths", num_sequences, "one length per row of blocks"),
        )
        for name, length, remedy in sides:
            side = vector("BlockTable", name, getattr(self, name), length, (torch.int32,), remedy)
            object.__setattr__(self, name, side)
        object.__setattr__(self, "blocks", self.blocks.contiguous())
        expect_same_device(
            "BlockTable", q_offsets=self.q_offsets, blocks=self.blocks, lengths=self.lengths
        )
        # A tensor object that only this table has: the key of its derived tables; see once.py.
        object.__setattr__(self, "q_offsets", self.q_offsets.view(-1))

    @classmethod
    def of(
        cls,
        blocks: Sequence[Sequence[int]],
        lengths: Sequence[int],
        block_tokens: int,
        num_queries: Sequence[int] | None = None,
        device: torch.device | str | None = None,
    ) -> "BlockTable":
        """A table of host values, on `device` or torch's default.

        Args:
            blocks: numbers of each sequence's blocks, in the order of its keys.
            lengths: keys of each sequence.
            block_tokens: slots of a block.
            num_queries: queries of each sequence; None means 1.
            device: where the cache is.

        Raises:
            ShapeError: the lists differ in length.
            PositionError: a number is negative, or a sequence has more keys than slots.
        """
        width = max(map(len, blocks), default=0)
        # Columns past a sequence's last block are never read; 0 is a block that exists.
        rows = [[*row, *[0] * (width - len(row))] for row in blocks]
        counts = [1] * len(rows) if num_queries is None else num_queries
        offsets, lengths = list(accumulate(counts, initial=0)), list(lengths)
        on_host = partial(torch.tensor, dtype=torch.int32, device="cpu")
        padded = on_host(rows).view(len(rows), width)
        longest = max(lengths, default=0)
        table = cls(on_host(offsets), padded, on_host(lengths), block_tokens, longest)
        table._spans(offsets, rows, lengths)
        device = torch.get_default_device() if device is None else torch.device(device)
        if device.type == "cpu":
            return table
        q_offsets, blocks_there = table.q_offsets.to(device), table.blocks.to(device)
        return cls(q_offsets, blocks_there, table.lengths.to(device), block_tokens, longest)

    def validate(self, num_queries: int | None = None, num_slots: int | None = None) -> None:
        """Raise PositionError unless offsets, blocks and lengths are in range; synchronises."""
        last_query, last_block = self._spans()
        if num_queries is not None and last_query > num_queries:
            raise PositionError(
                f"BlockTable: q_offsets end at {last_query}; expected at most {num_queries}; pass "
                "all queries"
            )
        if num_slots is not None and (last_block + 1) * self.block_tokens > num_slots:
            raise PositionError(
                f"BlockTable: blocks name block {last_block}; expected blocks of "
                f"{self.block_tokens} slots within {num_slots}; pass the whole cache"
            )

    def _spans(self, *host: list) -> tuple[int, int]:
        """`_span` of q_offsets, blocks and lengths, or of their values on the host; made once."""
        parts = self.q_offsets, self.blocks, self.lengths
        return once(
            parts, ("span",), lambda: self._span(*(host or [part.tolist() for part in parts]))
        )

    def _span(
        self, offsets: list[int], blocks: list[list[int]], lengths: list[int]
    ) -> tuple[int, int]:
        """The end of the last sequence's queries, and the highest block that holds a key; -1
        without any."""
        if offsets[0] < 0 or sorted(offsets) != offsets:
            raise PositionError(
                f"BlockTable: q_offsets are {offsets}; expected ascending from 0 or more; "
                "count the queries of the sequences in order"
            )
        num_slots = self.blocks.shape[1] * self.block_tokens
        if min(lengths, default=0) < 0 or max(lengths, default=0) > num_slots:
            raise PositionError(
                f"BlockTable: lengths are {lengths}; expected 0 to {num_slots}, the slots "
                "of a row of blocks; append blocks"
            )
        # ceil(length / block_tokens) blocks hold a sequence's keys.
        counts = (-(-length // self.block_tokens) for length in lengths)
        used = [row[:count] for row, count in zip(blocks, counts, strict=True) if count]
        lowest = min(map(min, used), default=0)
        if lowest < 0:
            raise PositionError(
                f"BlockTable: a key is in block {lowest}; expected 0 or more; fill the "
                "rows up to the last key"
            )
        return offsets[-1], max(map(max, used), default=-1)
