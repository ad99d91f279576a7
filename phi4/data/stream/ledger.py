"""The ledger: the number of units drawn from each source, and the blends they were drawn under.

It is the complete state of the training stream. The n-th unit of a source is element n of a
permutation determined by its name, the seed and the epoch, so counts are enough to resume anywhere:
at another data-parallel size, batch size or sequence length, and with another blend. A source that
is removed from the blend keeps its count and resumes at its position when it is added again.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import msgspec
import numpy as np

from phi4.data.stream.blend import draw_order, drawn_after, integer_shares, loss_order
from phi4.errors import DataError

LossOf = Callable[[str, np.ndarray], np.ndarray]
Counts = dict[str, tuple[int, int]]
"""Units drawn and loss tokens, by source."""


class SourceCount(msgspec.Struct, forbid_unknown_fields=True):
    """Size of a source and the number of units drawn from it since the run began."""

    num_units: int
    drawn: int = 0
    whole_rows: bool = False
    """Whether one of its units is a row, regardless of the blend's draw size."""
    loss_tokens: int = 0
    """Counted under blends that are weighted by loss tokens."""
    content: str = ""
    """sha256 of its content and of how it is cut."""

    def described(self) -> str:
        """Fields that must not change on resume, as text."""
        return f"{self.num_units} {'rows' if self.whole_rows else 'units'} of {self.content[:12]}"


class BlendEntry(msgspec.Struct, forbid_unknown_fields=True):
    """A blend and the counts at which it began."""

    weights: dict[str, float]
    drawn: dict[str, int]
    draw_units: int = 1
    """Units of the stream per draw."""
    weigh_by: Literal["units", "loss_tokens"] = "units"
    loss_tokens: dict[str, int] = {}

    def same_as(self, other: "BlendEntry") -> bool:
        """Return whether both draw in the same way."""
        return (_ratio(self.weights), self.draw_units, self.weigh_by) == (
            _ratio(other.weights),
            other.draw_units,
            other.weigh_by,
        )


class LedgerState(msgspec.Struct, forbid_unknown_fields=True):
    """The ledger's state in a checkpoint."""

    seed: int
    unit_tokens: int
    sources: dict[str, SourceCount]
    blends: list[BlendEntry]

    def draws(self) -> int:
        """Draws since the last blend began."""
        blend = self.blends[-1]
        return sum(
            (count.drawn - blend.drawn.get(name, 0)) // per_draw(count, blend.draw_units)
            for name, count in self.sources.items()
        )


@dataclass(frozen=True, eq=False)
class Draws:
    """The next draws of the stream, [n] int64 each."""

    source: np.ndarray
    """Index into the ledger's names."""
    ordinal: np.ndarray
    """Number of units of its source drawn before the first one of this draw, since the
    beginning."""
    loss: np.ndarray | None
    """Loss tokens, if the blend is weighted by them."""


class Ledger:
    """Makes draws by the quota rules and counts them.

    Attributes:
        names: sources of the blend, sorted.
        draw_units: units of the stream that one draw fills.
    """

    def __init__(
        self,
        sources: Mapping[str, SourceCount],
        blend: BlendEntry,
        *,
        seed: int,
        unit_tokens: int,
        state: dict[str, Any] | None = None,
        loss_of: LossOf | None = None,
    ) -> None:
        """Start a new ledger or resume from a state; a blend that differs from the last one starts
        with new counts.

        Args:
            sources: sizes of the blend's sources; their counts are ignored.
            blend: weights in any scale, and their unit; its counts are ignored. Ties go to the
                first name in sorted order, so the order in a recipe does not matter.
            seed: seed of the permutations.
            unit_tokens: labels per unit.
            state: from `state()`.
            loss_of: (name, [n] ordinals) to the loss tokens of draws, for blends weighted by them.

        Raises:
            DataError: the state is damaged, a source, the seed or the unit differs from the
                state's, or a source was counted under another name.
        """
        self.names = tuple(sorted(blend.weights))
        self.draw_units = blend.draw_units
        self._shares = integer_shares([blend.weights[name] for name in self.names])
        self._loss_of = loss_of
        if state is None:
            self._state = LedgerState(seed=seed, unit_tokens=unit_tokens, sources={}, blends=[])
        else:
            self._state = parse_state(state)
            self._check_run(seed, unit_tokens)
        for name, size in sources.items():
            self._check_name(name, size)
            fresh = msgspec.structs.replace(size, drawn=0, loss_tokens=0)
            count = self._state.sources.setdefault(name, fresh)
            same = msgspec.structs.replace(size, drawn=count.drawn, loss_tokens=count.loss_tokens)
            if count != same:
                raise DataError(
                    f"source {name!r} is {size.described()}, but the checkpoint has "
                    f"{count.described()}; restore its files (for windows also sequence_length and "
                    f"the bounds), or give a source with other content another name"
                )
        self._begin_blend(blend)

    def draw(self, num_draws: int) -> Draws:
        """Return the next draws, without counting them."""
        counts = [self._state.sources[name] for name in self.names]
        steps = [per_draw(count, self.draw_units) for count in counts]
        loss = None
        if self._state.blends[-1].weigh_by == "units":
            source = draw_order(self._shares, self._draws_since(), num_draws)
        else:
            source, loss = self._draw_by_loss(counts, steps, num_draws)
        ordinal = np.empty_like(source)
        for index, (count, step) in enumerate(zip(counts, steps, strict=True)):
            chosen = np.flatnonzero(source == index)
            ordinal[chosen] = count.drawn + step * np.arange(chosen.size)
        return Draws(source, ordinal, loss)

    def count(self, draws: Draws) -> None:
        """Count draws that were made."""
        for index, name in enumerate(self.names):
            count, chosen = self._state.sources[name], draws.source == index
            count.drawn += int(np.count_nonzero(chosen)) * per_draw(count, self.draw_units)
            if draws.loss is not None:
                count.loss_tokens += int(draws.loss[chosen].sum())

    def skip(self, num_draws: int) -> None:
        """Make and count draws; constant time for blends of units with short weights."""
        after = self.drawn_after(num_draws)
        if after is None:
            self.count(self.draw(num_draws))
            return
        for name, drawn in after.items():
            self._state.sources[name].drawn = drawn

    def drawn_after(self, num_draws: int) -> dict[str, int] | None:
        """Return units of each source after some draws; None for blends weighted by loss tokens."""
        if self._state.blends[-1].weigh_by == "loss_tokens":
            return None
        since = self._draws_since()
        after = drawn_after(self._shares, since, num_draws)
        counts = [self._state.sources[name] for name in self.names]
        return {
            name: count.drawn + (new - old) * per_draw(count, self.draw_units)
            for name, count, old, new in zip(self.names, counts, since, after, strict=True)
        }

    def state(self) -> dict[str, Any]:
        """Return the state as plain JSON."""
        return msgspec.to_builtins(self._state)

    def _draws_since(self) -> list[int]:
        began = self._state.blends[-1].drawn
        counts = ((name, self._state.sources[name]) for name in self.names)
        return [(c.drawn - began.get(n, 0)) // per_draw(c, self.draw_units) for n, c in counts]

    def _draw_by_loss(
        self, counts: list[SourceCount], steps: list[int], num_draws: int
    ) -> tuple[np.ndarray, np.ndarray]:
        began = self._state.blends[-1].loss_tokens
        served = [
            count.loss_tokens - began.get(name, 0)
            for name, count in zip(self.names, counts, strict=True)
        ]

        def loss_of(source: int, begin: int, end: int) -> np.ndarray:
            ordinals = counts[source].drawn + steps[source] * np.arange(begin, end)
            assert self._loss_of is not None, "weighed by loss tokens"
            return self._loss_of(self.names[source], ordinals)

        return loss_order(self._shares, served, num_draws, loss_of)

    def _check_run(self, seed: int, unit_tokens: int) -> None:
        for key, now, then in (
            ("run.seed", seed, self._state.seed),
            ("data.unit_tokens", unit_tokens, self._state.unit_tokens),
        ):
            if now != then:
                raise DataError(
                    f"{key}={now}, but the checkpoint's stream was drawn with {then}; restore it, "
                    f"otherwise units would be repeated and lost"
                )

    def _check_name(self, name: str, size: SourceCount) -> None:
        """Raise an error for a source under a new name, because its units would be drawn again."""
        counts = self._state.sources
        if name in counts or not size.content:
            return
        for former, count in counts.items():
            # A former name that is still in the blend shows that both are intended.
            if count.drawn and former not in self.names and count.content == size.content:
                raise DataError(
                    f"source {name!r} has the content of {former!r}, of which {count.drawn} of "
                    f"{count.num_units} units were drawn and would be repeated; rename it to "
                    f"{former!r}, or keep {former!r} in data.sources with weight 0 if that is "
                    f"intended"
                )

    def _begin_blend(self, blend: BlendEntry) -> None:
        blends, sources = self._state.blends, self._state.sources
        drawn = {name: count.drawn for name, count in sources.items()}
        if blends and not blends[-1].same_as(blend) and drawn.items() >= blends[-1].drawn.items():
            blends.pop()  # Nothing was drawn under it.
        if not blends or not blends[-1].same_as(blend):
            loss = {n: count.loss_tokens for n, count in sources.items() if count.loss_tokens}
            begun = msgspec.structs.replace(blend, drawn=drawn, loss_tokens=loss)
            blends.append(begun)


def per_draw(count: SourceCount, draw_units: int) -> int:
    """Return the units that one draw takes from a source."""
    return 1 if count.whole_rows else draw_units


def parse_state(state: dict[str, Any]) -> LedgerState:
    """Parse a ledger from a checkpoint.

    Raises:
        DataError: it is not a ledger.
    """
    try:
        return msgspec.convert(state, LedgerState)
    except msgspec.ValidationError as error:
        raise DataError(
            f"the checkpoint's data ledger is invalid ({error}); use another checkpoint"
        ) from None


def _ratio(weights: dict[str, float]) -> dict[str, int]:
    shares = integer_shares(list(weights.values()))
    return {name: share for name, share in zip(weights, shares, strict=True) if share}
