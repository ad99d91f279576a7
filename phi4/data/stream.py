"""The training stream: an endless order of units that is a function of seed, sources and blend.

The quota rule says which source comes next, the source's permutation of the current epoch says
which of its units. Nobody stores an order; a rank computes the units of its own rows.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from phi4.data.ledger import Ledger
from phi4.data.permutation import permutation_key, permute
from phi4.data.token_file import check_ids
from phi4.data.tokenizer import TokenizerFacts
from phi4.data.units import Source


class Stream:
    """Units of a blend in training order."""

    def __init__(
        self,
        sources: Sequence[Source],
        weights: Sequence[float],
        tokenizer: TokenizerFacts,
        *,
        seed: int,
        state: dict[str, Any] | None = None,
    ) -> None:
        """Begin, or go on from a ledger state.

        Args:
            sources: distinct names, one unit size.
            weights: fraction of the units of each source, in any scale.
            tokenizer: whose ids the sources hold.
            seed: names the order.
            state: from `state()`.

        Raises:
            DataError: see `Ledger`.
        """
        self._sources = sorted(sources, key=lambda source: source.name)
        self._tokenizer = tokenizer
        self._seed = seed
        self._unit_tokens = sources[0].unit_tokens
        self._ledger = Ledger(
            {source.name: source.num_units for source in sources},
            {source.name: weight for source, weight in zip(sources, weights, strict=True)},
            seed=seed,
            unit_tokens=self._unit_tokens,
            state=state,
        )

    def next_units(self, num_units: int) -> tuple[np.ndarray, np.ndarray]:
        """Draw units and count them.

        Returns:
            source: [num_units] int64, index of each draw's source among the sorted names.
            ordinal: [num_units] int64, its place in the endless order of that source.
        """
        source, ordinal = self._ledger.draw(num_units)
        self._ledger.count(source)
        return source, ordinal

    def state(self) -> dict[str, Any]:
        """The ledger as plain JSON."""
        return self._ledger.state()

    def units(self, source: np.ndarray, ordinal: np.ndarray) -> np.ndarray:
        """Which unit of its source each draw stands for, [n] int64."""
        unit = np.empty_like(ordinal)
        for index, item in enumerate(self._sources):
            chosen = np.flatnonzero(source == index)
            epochs, place = np.divmod(ordinal[chosen], item.num_units)
            for epoch in np.unique(epochs).tolist():
                within = epochs == epoch
                key = permutation_key(self._seed, item.name, epoch)
                unit[chosen[within]] = permute(place[within], item.num_units, key)
        return unit

    def read(
        self, source: np.ndarray, unit: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Inputs, labels and label weights of some units.

        The label after an end-of-document token and the padding of a partial unit weigh 0.

        Returns:
            tokens: [n, unit_tokens] int64.
            labels: [n, unit_tokens] int64.
            weights: [n, unit_tokens] bool.

        Raises:
            DataError: an id is outside the vocabulary.
        """
        window = np.full((unit.size, self._unit_tokens + 1), self._tokenizer.pad_id, dtype=np.int32)
        filled = np.empty(unit.size, dtype=np.int64)
        for row, (index, number) in enumerate(zip(source.tolist(), unit.tolist(), strict=True)):
            filled[row] = self._sources[index].read(number, window[row])

        def locate(position: int) -> str:
            row, offset = divmod(position, window.shape[1])
            return self._sources[source[row]].locate(int(unit[row]), offset)

        check_ids(window, self._tokenizer.vocab_size, locate)
        tokens, labels = (window[:, i : i + self._unit_tokens].astype(np.int64) for i in (0, 1))
        weights = tokens != self._tokenizer.eod_id
        for row in np.flatnonzero(filled < window.shape[1]):
            weights[row, filled[row] - 1 :] = False
        return tokens, labels, weights
