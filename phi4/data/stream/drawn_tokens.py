"""Count the tokens of the ledger's draws, by source."""

from collections.abc import Iterator

from phi4.data.stream.ledger import BlendEntry, LedgerState, SourceCount


def drawn_tokens(ledger: LedgerState) -> dict[str, int]:
    """Return the tokens of every unit or row drawn since the ledger began, by source.

    This includes padding of rows, and windows that were skipped after a spike: they were drawn and
    will not be drawn again.
    """
    return {name: _tokens(ledger, name, count) for name, count in ledger.sources.items()}


def _tokens(ledger: LedgerState, name: str, count: SourceCount) -> int:
    if not count.whole_rows:
        return count.drawn * ledger.unit_tokens
    # A row has the row length of the blend that drew it.
    return sum(
        drawn * blend.draw_units * ledger.unit_tokens
        for blend, drawn in _drawn_by_blend(ledger, name, count)
    )


def _drawn_by_blend(
    ledger: LedgerState, name: str, count: SourceCount
) -> Iterator[tuple[BlendEntry, int]]:
    begins = [blend.drawn.get(name, 0) for blend in ledger.blends]
    for blend, begin, end in zip(ledger.blends, begins, [*begins[1:], count.drawn], strict=True):
        yield blend, end - begin
