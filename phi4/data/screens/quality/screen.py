"""The pipeline of every filter: read, analyse in parallel, decide in order, write kept and rejected
rows.

`analyse` is a pure function of a text and runs in worker processes; `decide` gets the analyses one
by one in row order and may keep state. The outcome does not depend on the number of workers, and
memory holds a few batches of rows regardless of the input's size.
"""

import json
import multiprocessing
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, TypeVar

from phi4.data.screens.quality.inputs import list_inputs
from phi4.data.screens.quality.outputs import QUARANTINE, Outputs
from phi4.data.screens.quality.rows import (
    DEFAULT_FORMAT,
    Line,
    RowError,
    RowFormat,
    parse,
    read_lines,
    shown,
    text_of,
)
from phi4.errors import DataError

BAD_ROW = "bad row"
MAX_BAD_ROWS = 1000

Analysis = TypeVar("Analysis")

_BATCH_BYTES = 1 << 20
_BATCH_LINES = 512
_BATCHES_PER_WORKER = 3


@dataclass(frozen=True)
class Rejection:
    """Reason for rejecting a row; `details` must be JSON."""

    reason: str
    details: Mapping[str, object] = field(default_factory=dict)


@dataclass
class Screened:
    """Counts of kept and rejected rows."""

    num_kept: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    """Rows per reason; `bad row` counts all unreadable rows."""

    @property
    def num_rows(self) -> int:
        """Rows read."""
        return self.num_kept + self.rejected.total()

    def summary(self) -> str:
        """One line."""
        parts = [f"{count} {reason}" for reason, count in sorted(self.rejected.items())]
        out = f"; quarantined: {', '.join(parts)}" if parts else ""
        return f"{self.num_rows} rows, {self.num_kept} kept{out}"


def _accept() -> None:
    """Any outcome."""


@dataclass(frozen=True)
class Rule(Generic[Analysis]):
    """What a filter rejects.

    Attributes:
        analyse: analyses a text; must be picklable if there are worker processes.
        decide: called once per readable row, in input order, with the line it comes from.
        conclude: called after all rows; raises DataError if the outcome is not to be trusted, and
            nothing is kept.
    """

    analyse: Callable[[str], Analysis]
    decide: Callable[[Analysis, Line], Rejection | None]
    conclude: Callable[[], None] = _accept


def screen(
    inputs: Sequence[Path],
    directory: Path,
    rule: Rule,
    *,
    row_format: RowFormat = DEFAULT_FORMAT,
    num_workers: int = 1,
    max_bad_rows: int = MAX_BAD_ROWS,
) -> Screened:
    """Write each input's accepted rows to `directory/NAME.jsonl`, the others to the quarantine.

    Accepted rows keep their bytes; those of parquet become lines of JSON. Files are renamed after
    all rows are done, so a job that dies leaves none that looks complete.

    Args:
        inputs: .jsonl files, plain, .gz or .zst, .parquet, directories of them; see `list_inputs`
            for their names.
        directory: created if missing; must hold no output of these names.
        rule: decides which rows are rejected.
        row_format: longer rows are quarantined.
        num_workers: processes that analyse; 1 analyses in this process.
        max_bad_rows: number of unreadable rows beyond which the job stops.

    Raises:
        DataError: an input cannot be read, too many rows or all are bad, two inputs have one name,
            an output exists or cannot be written, the rule refuses the outcome, or a worker died.
        DiskFullError: the output does not fit on the disk.
    """
    outcome = Screened()
    rejection: Rejection | None = None
    files = list_inputs(inputs)
    with Outputs(files, directory) as outputs:
        paths = [item.path for item in files]
        for line, result in analyse_rows(
            paths, rule.analyse, row_format=row_format, num_workers=num_workers
        ):
            if isinstance(result, RowError):
                rejection, reason = Rejection(str(result)), BAD_ROW
            else:
                rejection = rule.decide(result, line)
                reason = rejection.reason if rejection else ""
            if rejection is None:
                outcome.num_kept += 1
                outputs.keep(line.path, line.raw)
            else:
                outcome.rejected[reason] += 1
                outputs.hold(_quarantined(line, rejection))
                if outcome.rejected[BAD_ROW] > max_bad_rows:
                    raise DataError(
                        f"{outcome.rejected[BAD_ROW]} rows are bad, at most {max_bad_rows} are "
                        f"allowed; see {directory / QUARANTINE}.part, then repair the inputs, give "
                        f"the column with --text-field, or raise --max-bad-rows"
                    )
        if 0 < outcome.num_rows == outcome.rejected[BAD_ROW] and rejection is not None:
            raise DataError(
                f"all {outcome.num_rows} rows are bad ({rejection.reason}); give the column of the "
                f"text with --text-field"
            )
        rule.conclude()
    return outcome


def analyse_rows(
    inputs: Sequence[Path],
    analyse: Callable[[str], Analysis],
    *,
    row_format: RowFormat = DEFAULT_FORMAT,
    num_workers: int = 1,
) -> Iterator[tuple[Line, Analysis | RowError]]:
    """Yield each line of the inputs in order, with the analysis of its text or the reason why there
    is none.

    Raises:
        DataError: an input cannot be read, or a worker died.
    """
    batches = _batches(read_lines(inputs, row_format))
    if num_workers <= 1:
        for batch in batches:
            yield from zip(batch, _analyse(batch, analyse, row_format), strict=True)
        return
    # Spawned, not forked: a fork of a process with threads may hang.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_workers, context, _keep, (analyse, row_format)) as pool:
        try:
            for batch, results in _in_order(pool, batches, num_workers * _BATCHES_PER_WORKER):
                yield from zip(batch, results, strict=True)
        except BrokenProcessPool:
            raise DataError(
                "a worker process died, most likely for lack of memory; use fewer workers"
            ) from None


def _quarantined(line: Line, rejection: Rejection) -> bytes:
    row = {
        "file": str(line.path),
        "line": line.number,
        "reason": rejection.reason,
        **rejection.details,
        "row": shown(line),
    }
    return json.dumps(row).encode()


def _in_order(
    pool: ProcessPoolExecutor, batches: Iterable[list[Line]], num_in_flight: int
) -> Iterator[tuple[list[Line], list]]:
    waiting: deque[tuple[list[Line], Future]] = deque()
    for batch in batches:
        waiting.append((batch, pool.submit(_analyse_kept, batch)))
        if len(waiting) >= num_in_flight:
            first, future = waiting.popleft()
            yield first, future.result()
    for first, future in waiting:
        yield first, future.result()


def _batches(lines: Iterable[Line]) -> Iterator[list[Line]]:
    batch: list[Line] = []
    num_bytes = 0
    for line in lines:
        batch.append(line)
        num_bytes += len(line.raw)
        if num_bytes >= _BATCH_BYTES or len(batch) >= _BATCH_LINES:
            yield batch
            batch, num_bytes = [], 0
    if batch:
        yield batch


def _analyse(
    batch: Iterable[Line], analyse: Callable[[str], Analysis], row_format: RowFormat
) -> list[Analysis | RowError]:
    results: list[Analysis | RowError] = []
    for line in batch:
        try:
            text = text_of(parse(line, row_format), row_format)
        except RowError as error:
            results.append(error)
        else:
            results.append(analyse(text))
    return results


# The analysis is sent to a worker once, when it starts: it may hold a large index.
_kept: list = []


def _keep(*arguments: object) -> None:
    _kept[:] = arguments


def _analyse_kept(batch: list[Line]) -> list:
    return _analyse(batch, *_kept)
