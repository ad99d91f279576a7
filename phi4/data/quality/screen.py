"""One stream for every screen: read, analyse in parallel, decide in order, write to two doors.

`analyse` is a pure function of a text and runs in worker processes; `decide` sees the analyses one
by one in the order of the rows and may keep state. So the outcome does not depend on the worker
count, and memory holds a few batches of rows whatever the size of the input.
"""

import json
import multiprocessing
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, TypeVar

from phi4.data.quality.rows import MAX_ROW_BYTES, Line, RowError, parse, read_lines, shown, text_of
from phi4.errors import DataError

QUARANTINE = "quarantine.jsonl"
BAD_ROW = "bad row"
MAX_BAD_ROWS = 1000

Analysis = TypeVar("Analysis")

_BATCH_BYTES = 1 << 20
_BATCH_LINES = 512
_BATCHES_PER_WORKER = 3


@dataclass(frozen=True)
class Rejection:
    """Why a row is kept out; `details` must be JSON."""

    reason: str
    details: dict[str, object] = field(default_factory=dict)


@dataclass
class Screened:
    """What went through which door."""

    num_kept: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    """Rows per reason; `bad row` counts all that could not be read."""

    @property
    def num_rows(self) -> int:
        """Rows read."""
        return self.num_kept + self.rejected.total()

    def summary(self) -> str:
        """One line."""
        parts = [f"{count} {reason}" for reason, count in sorted(self.rejected.items())]
        out = f"; quarantined: {', '.join(parts)}" if parts else ""
        return f"{self.num_rows} rows, {self.num_kept} kept{out}"


def screen(
    inputs: Sequence[Path],
    directory: Path,
    analyse: Callable[[str], Analysis],
    decide: Callable[[Analysis, Line], Rejection | None],
    *,
    num_workers: int = 1,
    max_row_bytes: int = MAX_ROW_BYTES,
    max_bad_rows: int = MAX_BAD_ROWS,
) -> Screened:
    """Write each input's accepted rows to `directory/NAME.jsonl`, the others to quarantine.jsonl.

    Accepted rows keep their bytes. Files get their names when all rows are through, so a job that
    dies leaves none that looks complete.

    Args:
        inputs: .jsonl files, plain, .gz or .zst.
        directory: made when missing; must hold no output of these names.
        analyse: picklable when num_workers > 1.
        decide: called once per readable row, in input order, with the line it comes from.
        num_workers: processes that analyse; 1 analyses in this one.
        max_row_bytes: longer lines are quarantined without being read into memory.
        max_bad_rows: rows that cannot be read, beyond which the job stops.

    Raises:
        DataError: an input cannot be read, too many rows are bad, two inputs have one name, an
            output exists, or a worker died.
    """
    outcome = Screened()
    with _outputs(inputs, directory) as (doors, quarantine):
        for line, result in analyse_rows(
            inputs, analyse, num_workers=num_workers, max_row_bytes=max_row_bytes
        ):
            if isinstance(result, RowError):
                rejection, reason = Rejection(str(result)), BAD_ROW
            else:
                rejection = decide(result, line)
                reason = rejection.reason if rejection else ""
            if rejection is None:
                outcome.num_kept += 1
                doors[line.path].write(line.raw + b"\n")
            else:
                outcome.rejected[reason] += 1
                quarantine.write(_quarantined(line, rejection))
                if outcome.rejected[BAD_ROW] > max_bad_rows:
                    raise DataError(
                        f"{outcome.rejected[BAD_ROW]} rows are bad, at most {max_bad_rows} are "
                        f"allowed; see {directory / QUARANTINE}.part, then mend the inputs or "
                        "raise --max-bad-rows"
                    )
    return outcome


def analyse_rows(
    inputs: Sequence[Path],
    analyse: Callable[[str], Analysis],
    *,
    num_workers: int = 1,
    max_row_bytes: int = MAX_ROW_BYTES,
) -> Iterator[tuple[Line, Analysis | RowError]]:
    """Each line of the inputs in order, with the analysis of its text or why there is none.

    Raises:
        DataError: an input cannot be read, or a worker died.
    """
    batches = _batches(read_lines(inputs, max_row_bytes))
    if num_workers <= 1:
        for batch in batches:
            yield from zip(batch, _analyse(batch, analyse, max_row_bytes), strict=True)
        return
    # Spawned, not forked: a fork of a process with threads may hang.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_workers, context, _keep, (analyse, max_row_bytes)) as pool:
        try:
            for batch, results in _in_order(pool, batches, num_workers * _BATCHES_PER_WORKER):
                yield from zip(batch, results, strict=True)
        except BrokenProcessPool:
            raise DataError(
                "a worker process died, most likely for lack of memory; use fewer workers"
            ) from None


@contextmanager
def _outputs(
    inputs: Sequence[Path], directory: Path
) -> Iterator[tuple[dict[Path, BinaryIO], BinaryIO]]:
    names = {path: path.name.partition(".jsonl")[0] + ".jsonl" for path in map(Path, inputs)}
    taken = Counter([*names.values(), QUARANTINE])
    twice = next((name for name, count in taken.items() if count > 1), None)
    if twice is not None:
        raise DataError(f"two outputs would be called {twice}; rename an input or split the call")
    targets = [directory / name for name in taken]
    existing = next((target for target in targets if target.exists()), None)
    if existing is not None:
        raise DataError(f"{existing} exists; give another output directory or remove it")
    directory.mkdir(parents=True, exist_ok=True)
    parts = [target.with_name(target.name + ".part") for target in targets]
    with ExitStack() as stack:
        *doors, quarantine = [stack.enter_context(part.open("wb")) for part in parts]
        yield dict(zip(names, doors, strict=True)), quarantine
    for part, target in zip(parts, targets, strict=True):
        part.rename(target)


def _quarantined(line: Line, rejection: Rejection) -> bytes:
    row = {
        "file": str(line.path),
        "line": line.number,
        "reason": rejection.reason,
        **rejection.details,
        "row": shown(line),
    }
    return json.dumps(row).encode() + b"\n"


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
    batch: Iterable[Line], analyse: Callable[[str], Analysis], max_row_bytes: int
) -> list[Analysis | RowError]:
    results: list[Analysis | RowError] = []
    for line in batch:
        try:
            text = text_of(parse(line, max_row_bytes))
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
