"""Units: the fixed pieces that a source is cut into once, and that the ledger counts.

Unit u of a shard holds tokens [u * U, (u + 1) * U] inclusive: neighbours share one token, which is
the last label of one and the first input of the other. So every token but a shard's first is a
label exactly once, whatever the sequence length of the run.
"""

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

import numpy as np

from phi4.data.token_file import TokenFile
from phi4.errors import DataError


class Source:
    """An ordered list of shards under one name, addressed by unit.

    Attributes:
        name: as in the recipe.
        unit_tokens: labels per unit.
        num_units: units of all shards; the last one of a shard may be partial.
    """

    def __init__(self, name: str, shards: Sequence[TokenFile], unit_tokens: int) -> None:
        """Cut the shards.

        Raises:
            DataError: the shards hold no label.
        """
        self.name = name
        self.unit_tokens = unit_tokens
        self._shards = list(shards)
        counts = [-(-max(0, shard.num_tokens - 1) // unit_tokens) for shard in self._shards]
        self._starts = [0, *accumulate(counts)]
        self.num_units = self._starts[-1]
        if not self.num_units:
            raise DataError(
                f"source {name!r} holds no two tokens in a row, so there is nothing to learn; "
                "give it text or take it out of the recipe"
            )

    def read(self, unit: int, out: np.ndarray) -> int:
        """Copy the tokens of one unit.

        Args:
            unit: in [0, num_units).
            out: [unit_tokens + 1], filled from the front.

        Returns:
            Tokens copied; fewer than unit_tokens + 1 for the last unit of a shard.
        """
        shard, position = self._place(unit)
        tokens = shard.tokens[position : position + self.unit_tokens + 1]
        out[: tokens.size] = tokens
        return tokens.size

    def locate(self, unit: int, offset: int) -> str:
        """Source, file, document and offset behind a token of a unit, in words."""
        shard, position = self._place(unit)
        document, inside = shard.locate(position + offset)
        return f"source {self.name!r}, {shard.prefix}.bin, document {document}, offset {inside}"

    def _place(self, unit: int) -> tuple[TokenFile, int]:
        shard = bisect_right(self._starts, unit) - 1
        return self._shards[shard], (unit - self._starts[shard]) * self.unit_tokens
