"""The training stream: an endless sequence of units, a function of seed, sources and blend.

The quota rule gives the next source, and the source's permutation of the current epoch gives the
unit. No global order is stored; each rank computes the units of its own rows. A draw is one unit,
or one row in blends with a row-based source.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from phi4.data.permutation import permutation_key, permute
from phi4.data.stream.ledger import BlendEntry, Draws, Ledger, SourceCount
from phi4.data.stream.units import Rows
from phi4.data.vocabulary.tokenizer import TokenizerFacts
from phi4.errors import DataError


class Source(Protocol):
    """A source of the stream: pieces of a fixed size, numbered from 0.

    Attributes:
        name: name in the recipe.
        content: sha256 of its content and of how it is cut.
        num_units: number of pieces.
        row_tokens: tokens in a piece.
        whole_rows: whether a piece is a complete row; otherwise a row may join several pieces.
        has_pairs: whether pieces hold pairs, so that it is a `PairedSource`.
    """

    name: str
    content: str
    num_units: int
    row_tokens: int
    whole_rows: bool
    has_pairs: bool

    def describe(self) -> str:
        """Return a line for the start of a run: what is served and what is dropped; may be
        empty."""

    def fill(self, unit: int, rows: Rows) -> None:
        """Copy one piece into slices of [row_tokens]; the rest is padding.

        Raises:
            DataError: an id is outside the vocabulary (names source, document, offset).
        """

    def loss_tokens(self, units: np.ndarray) -> np.ndarray:
        """Return labels of weight 1 in each piece, [n] int64, at least 1."""

    def locate(self, unit: int, offset: int) -> str:
        """Describe source, file, document and offset of a token of a piece in words."""


@runtime_checkable
class PairedSource(Source, Protocol):
    """A source whose pieces hold pairs; `fill` expects rows with `pairs`."""

    def pair_counts(self, units: np.ndarray) -> np.ndarray:
        """Return pairs, and loss tokens of their chosen sides, in each piece, [n, 2] int64."""


class Stream:
    """Draws of a blend in training order.

    Attributes:
        draw_tokens: tokens that one draw fills.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        blend: BlendEntry,
        tokenizer: TokenizerFacts,
        *,
        seed: int,
        unit_tokens: int,
        state: dict[str, Any] | None = None,
    ) -> None:
        """Start at the beginning, or resume from a ledger state.

        Args:
            sources: sources of the blend.
            blend: weights by source name, and their unit.
            tokenizer: tokenizer that produced the sources' ids.
            seed: seed of the order.
            unit_tokens: labels per unit.
            state: from `state()`.

        Raises:
            DataError: see `Ledger`.
        """
        self._sources = sorted(sources, key=lambda source: source.name)
        self._named = {source.name: source for source in sources}
        self._tokenizer = tokenizer
        self._seed = seed
        self.draw_tokens = unit_tokens * blend.draw_units
        self._ledger = Ledger(
            {
                s.name: SourceCount(s.num_units, whole_rows=s.whole_rows, content=s.content)
                for s in sources
            },
            blend,
            seed=seed,
            unit_tokens=unit_tokens,
            state=state,
            loss_of=self._loss_of,
        )

    def next_draws(self, num_draws: int, max_epochs: Mapping[str, float]) -> Draws:
        """Make draws and count them.

        Raises:
            DataError: a source would be read more often than allowed.
        """
        draws = self._ledger.draw(num_draws)
        for index, source in enumerate(self._sources):
            chosen = draws.ordinal[draws.source == index]
            if chosen.size and max_epochs.get(source.name, 0):
                last = int(chosen[-1]) + self.draw_tokens // source.row_tokens - 1
                _check_epochs(source, last, max_epochs[source.name])
        self._ledger.count(draws)
        return draws

    def state(self) -> dict[str, Any]:
        """Return the ledger as plain JSON."""
        return self._ledger.state()

    def require_epochs(self, num_draws: int, max_epochs: Mapping[str, float]) -> None:
        """Raise an error if coming draws would read a source more often than allowed.

        Blends weighted by loss tokens cannot check this in advance; `next_draws` raises the error
        then.
        """
        drawn = self._ledger.drawn_after(num_draws)
        for source in self._sources:
            if drawn is not None and max_epochs.get(source.name, 0):
                _check_epochs(source, drawn[source.name] - 1, max_epochs[source.name])

    def peek(self, num_draws: int) -> Draws:
        """Return the next draws without counting them."""
        return self._ledger.draw(num_draws)

    def skip(self, num_draws: int) -> None:
        """Advance as if draws had been served."""
        self._ledger.skip(num_draws)

    def read(self, source: np.ndarray, ordinal: np.ndarray) -> Rows:
        """Return inputs, labels, label weights and document starts of some draws, [n, draw_tokens].

        Raises:
            DataError: an id is outside the vocabulary.
        """
        have_pairs = any(item.has_pairs for item in self._sources)
        rows = Rows.empty(source.size, self.draw_tokens, have_pairs=have_pairs)
        for index, item in enumerate(self._sources):
            chosen = np.flatnonzero(source == index)
            units = self._units(item, ordinal[chosen])
            # In file order: neighbours share a shard.
            for place in np.argsort(units, axis=None).tolist():
                draw, part = divmod(place, units.shape[1])
                begin = part * item.row_tokens
                item.fill(int(units[draw, part]), rows.cut(chosen[draw], begin, item.row_tokens))
        return rows

    def chosen_tokens_per_pair(self, draws: Draws) -> float:
        """Return the mean number of loss tokens on the chosen side of a pair over some draws; 1
        without pairs."""
        counts = np.zeros(2, dtype=np.int64)
        for index, item in enumerate(self._sources):
            if isinstance(item, PairedSource):
                units = self._units(item, draws.ordinal[draws.source == index])
                counts += item.pair_counts(units.reshape(-1)).sum(axis=0)
        pairs, tokens = counts.tolist()
        return tokens / pairs if pairs else 1.0

    def describe(self, source: int, ordinal: int) -> list[str]:
        """Describe where each document of one draw begins, in words."""
        item = self._sources[source]
        units = self._units(item, np.array([ordinal]))[0].tolist()
        return [
            f"epoch {(ordinal + i) // item.num_units + 1}, unit {unit}, token {begin}: "
            f"{item.locate(unit, begin)}"
            for i, unit in enumerate(units)
            for begin in self._begins(item, unit)
        ]

    def _begins(self, item: Source, unit: int) -> list[int]:
        """Return positions where documents begin in a unit, without padding."""
        rows = Rows.empty(1, item.row_tokens, have_pairs=item.has_pairs)
        cut = rows.cut(0, 0, item.row_tokens)
        item.fill(unit, cut)
        begins = cut.starts.copy()
        begins[1:] |= cut.tokens[:-1] == self._tokenizer.eod_id
        return [b for b in np.flatnonzero(begins).tolist() if cut.weights[b:].any()]

    def _units(self, item: Source, ordinal: np.ndarray) -> np.ndarray:
        """Return the units of one source's draws, [n, units per draw] int64."""
        per_draw = self.draw_tokens // item.row_tokens
        place = (ordinal[:, None] + np.arange(per_draw)).reshape(-1)
        epochs, place = np.divmod(place, item.num_units)
        unit = np.empty_like(place)
        for epoch in np.unique(epochs).tolist():
            within = epochs == epoch
            key = permutation_key(self._seed, item.name, epoch)
            unit[within] = permute(place[within], item.num_units, key)
        return unit.reshape(-1, per_draw)

    def _loss_of(self, name: str, ordinal: np.ndarray) -> np.ndarray:
        item = self._named[name]
        units = self._units(item, ordinal)
        return item.loss_tokens(units.reshape(-1)).reshape(units.shape).sum(axis=1)


def _check_epochs(source: Source, last_ordinal: int, allowed: float) -> None:
    if last_ordinal >= allowed * source.num_units:
        raise DataError(
            f"source {source.name!r} would be read {(last_ordinal + 1) / source.num_units:.2f} "
            f"times, but its max_epochs is {allowed:g}; lower its weight, raise max_epochs or end "
            f"the run earlier"
        )
