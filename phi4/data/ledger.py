"""The ledger: how many units each source has given, under which blends.

It is the whole state of the training stream. The n-th draw of a source is element n of a
permutation that its name, the seed and the epoch define, so counts are enough to go on anywhere: at
another data-parallel size, batch size or sequence length, and with another blend. A source that
leaves the blend keeps its count and continues where it stood when it comes back.
"""

from collections.abc import Mapping
from typing import Any

import msgspec
import numpy as np

from phi4.data.blend import integer_shares, quota_order
from phi4.errors import DataError


class SourceCount(msgspec.Struct, forbid_unknown_fields=True):
    """Size of a source and the units drawn from it since the run began."""

    num_units: int
    drawn: int = 0


class BlendEntry(msgspec.Struct, forbid_unknown_fields=True):
    """A blend and the counts at which it began."""

    weights: dict[str, float]
    drawn: dict[str, int]


class LedgerState(msgspec.Struct, forbid_unknown_fields=True):
    """What a checkpoint keeps."""

    seed: int
    unit_tokens: int
    sources: dict[str, SourceCount]
    blends: list[BlendEntry]


class Ledger:
    """Draws units by the quota rule and counts them.

    Attributes:
        names: sources of the blend, sorted.
    """

    def __init__(
        self,
        num_units: Mapping[str, int],
        weights: Mapping[str, float],
        *,
        seed: int,
        unit_tokens: int,
        state: dict[str, Any] | None = None,
    ) -> None:
        """Begin, or go on from a state; weights that differ from its last blend begin a new one.

        Args:
            num_units: units of each source of the blend.
            weights: weight of each, in any scale. Ties go to the first name in sorted order, so
                the order of a recipe's sources means nothing.
            seed: names the permutations.
            unit_tokens: labels per unit.
            state: from `state()`.

        Raises:
            DataError: the state is damaged, or a source, the seed or the unit is not the one that
                it counted.
        """
        self.names = tuple(sorted(weights))
        self._shares = integer_shares([weights[name] for name in self.names])
        if state is None:
            self._state = LedgerState(seed=seed, unit_tokens=unit_tokens, sources={}, blends=[])
        else:
            self._state = _parse(state)
            self._check_run(seed, unit_tokens)
        for name, size in num_units.items():
            count = self._state.sources.setdefault(name, SourceCount(size))
            if count.num_units != size:
                raise DataError(
                    f"source {name!r} has {size} units, the checkpoint counted "
                    f"{count.num_units}; give a source with other content another name"
                )
        self._begin_blend(dict(weights))

    def draw(self, num_units: int) -> tuple[np.ndarray, np.ndarray]:
        """The next units of the stream, without counting them.

        Returns:
            source: [num_units] int64, index into `names`.
            ordinal: [num_units] int64, how many units of its source came before, ever.
        """
        began = self._state.blends[-1].drawn
        totals = [self._state.sources[name].drawn for name in self.names]
        since = [total - began.get(name, 0) for name, total in zip(self.names, totals, strict=True)]
        source = quota_order(self._shares, since, num_units)
        ordinal = np.empty_like(source)
        for index, total in enumerate(totals):
            chosen = np.flatnonzero(source == index)
            ordinal[chosen] = np.arange(total, total + chosen.size)
        return source, ordinal

    def count(self, source: np.ndarray) -> None:
        """Count drawn units, [n] indices into `names`."""
        for name, number in zip(
            self.names, np.bincount(source, minlength=len(self.names)).tolist(), strict=True
        ):
            self._state.sources[name].drawn += number

    def state(self) -> dict[str, Any]:
        """Plain JSON."""
        return msgspec.to_builtins(self._state)

    def _check_run(self, seed: int, unit_tokens: int) -> None:
        for key, now, then in (
            ("run.seed", seed, self._state.seed),
            ("data.unit_tokens", unit_tokens, self._state.unit_tokens),
        ):
            if now != then:
                raise DataError(
                    f"{key}={now}, the checkpoint's stream was drawn with {then}; set it back, or "
                    "units would be repeated and lost"
                )

    def _begin_blend(self, weights: dict[str, float]) -> None:
        blends, sources = self._state.blends, self._state.sources
        drawn = {name: count.drawn for name, count in sources.items()}
        changed = not blends or _ratio(blends[-1].weights) != _ratio(weights)
        if blends and changed and drawn.items() >= blends[-1].drawn.items():
            blends.pop()  # nothing was drawn under it
        if not blends or _ratio(blends[-1].weights) != _ratio(weights):
            blends.append(BlendEntry(weights=weights, drawn=drawn))


def _parse(state: dict[str, Any]) -> LedgerState:
    try:
        return msgspec.convert(state, LedgerState)
    except msgspec.ValidationError as error:
        raise DataError(
            f"the checkpoint's data position is not one of phi4 ({error}); take another checkpoint"
        ) from None


def _ratio(weights: dict[str, float]) -> dict[str, int]:
    shares = integer_shares(list(weights.values()))
    return {name: share for name, share in zip(weights, shares, strict=True) if share}
