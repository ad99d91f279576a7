"""Reconstruct any earlier position of a stream from the ledger that it ended with.

The ledger records where every blend began, and a blend's draws are a function of their number, so
the last ledger of a run determines all of its steps. Under blends weighted by loss tokens the draws
are repeated one by one, starting from recorded counts of the position, or else from the nearest
available ledger.
"""

from collections.abc import Sequence

import msgspec

from phi4.data.stream.ledger import Counts, LedgerState, SourceCount
from phi4.errors import DataError


def rewind(
    latest: LedgerState,
    units_back: int,
    at_hand: Sequence[LedgerState] = (),
    recorded: Counts | None = None,
) -> tuple[LedgerState, int]:
    """Return a ledger at or before a position, under the blend in effect there, and the draws
    between.

    Args:
        latest: ledger at the end of the stream.
        units_back: units of the stream between the position and its end.
        at_hand: earlier ledgers of the same stream.
        recorded: recorded counts at the position, if available.

    Raises:
        DataError: the stream is shorter than that.
    """
    state = latest
    while units_back > state.draws() * state.blends[-1].draw_units:
        if len(state.blends) == 1:
            raise DataError(
                "the ledger counts fewer units than the run's steps took; the checkpoint's state "
                "and recipe are of different runs"
            )
        units_back -= state.draws() * state.blends[-1].draw_units
        state = _without_last_blend(state)
    wanted = state.draws() - units_back // state.blends[-1].draw_units
    near = [s for s in at_hand if s.blends == state.blends and s.draws() <= wanted]
    if recorded is not None:
        place = _counting(state, recorded)
        near += [place] if place.draws() == wanted else []
    start = max([_at_last_blend(state), *near], key=LedgerState.draws)
    return start, wanted - start.draws()


def units_by_blend(latest: LedgerState) -> list[int]:
    """Return units of the stream that were drawn under each blend, in order."""
    units, state = [], latest
    for number in reversed(range(len(latest.blends))):
        units.append(state.draws() * state.blends[-1].draw_units)
        state = _without_last_blend(state) if number else state
    return units[::-1]


def _at_last_blend(state: LedgerState) -> LedgerState:
    """Return the same stream at the moment its last blend began."""
    blend = state.blends[-1]
    loss = blend.loss_tokens
    return _counting(state, {name: (n, loss.get(name, 0)) for name, n in blend.drawn.items()})


def _counting(state: LedgerState, counts: Counts) -> LedgerState:
    """Return the state at another position, without sources that were added later."""
    sources = {
        name: msgspec.structs.replace(count, drawn=counts[name][0], loss_tokens=counts[name][1])
        for name, count in state.sources.items()
        if name in counts
    }
    return msgspec.structs.replace(state, sources=sources)


def _without_last_blend(state: LedgerState) -> LedgerState:
    begun = _at_last_blend(state)
    earlier = state.blends[:-1]
    known: dict[str, SourceCount] = {
        name: count
        for name, count in begun.sources.items()
        if count.drawn or any(name in blend.drawn for blend in earlier)
    }
    return msgspec.structs.replace(begun, sources=known, blends=earlier)
