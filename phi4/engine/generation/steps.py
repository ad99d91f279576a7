"""The computation of one pass over the model, as plain values that are the same on every rank."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from phi4.engine.generation.blocks import BlockCopy
from phi4.engine.generation.draws import Draw

TILE_TOKENS = 16
"""Tokens of a pass in batch-invariant mode."""


class StepRow(NamedTuple):
    """One sequence's part of a step.

    Attributes:
        tokens: new ids, at least one.
        start: position of the first of them; those before are cached.
        blocks: blocks of the cache for its tokens; see `BlockPool`.
        draws: one per token to draw after the last new one; empty in the middle of a prompt.
        scored: for the first new tokens, one each, how to score the token that follows: forced
            draws.
    """

    tokens: Sequence[int]
    start: int
    blocks: Sequence[int]
    draws: Sequence[Draw] = ()
    scored: Sequence[Draw] = ()

    @property
    def end(self) -> int:
        """Tokens of the sequence, including the new ones."""
        return self.start + len(self.tokens)


@dataclass(frozen=True)
class Step:
    """One pass on every rank; rows with one new token come first."""

    rows: Sequence[StepRow]
    copies: Sequence[BlockCopy] = ()

    @property
    def draws(self) -> list[Draw]:
        """Draws of all rows in order, each with its scored tokens first."""
        return [one for row in self.rows for one in (*row.scored, *row.draws)]


def tiles(step: Step, spare_block: int) -> Iterator[Step]:
    """Split a step into passes of `TILE_TOKENS` rows with one token each, the last one padded.

    A matrix product sums a row in an order that depends on the number of rows, and attention in one
    that depends on the tokens of a chunk. Here both are fixed. A token only attends to earlier ones
    of its sequence, which are in the same pass or in an earlier one.

    Args:
        step: a step whose copies have been made.
        spare_block: block for the keys of padding rows.
    """
    spare = StepRow([0], 0, [spare_block])
    singles = [one for row in step.rows for one in _single(row)]
    singles += [spare] * (-len(singles) % TILE_TOKENS)
    for start in range(0, len(singles), TILE_TOKENS):
        yield Step(singles[start : start + TILE_TOKENS])


def _single(row: StepRow) -> Iterator[StepRow]:
    for i, token in enumerate(row.tokens):
        draws = row.draws if i == len(row.tokens) - 1 else ()
        yield StepRow([token], row.start + i, row.blocks, draws, row.scored[i : i + 1])
