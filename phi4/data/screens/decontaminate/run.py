"""Decontaminate files of rows, with a count per benchmark."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from phi4.data.screens.decontaminate.benchmark import Item
from phi4.data.screens.decontaminate.rule import Detector, Finding, Match, Verdict
from phi4.data.screens.quality.inputs import list_inputs
from phi4.data.screens.quality.outputs import writing
from phi4.data.screens.quality.rows import DEFAULT_FORMAT, Line, RowError, RowFormat
from phi4.data.screens.quality.screen import (
    MAX_BAD_ROWS,
    Rejection,
    Rule,
    Screened,
    analyse_rows,
    screen,
)
from phi4.errors import DataError

REPORT = "decontaminate.report"
"""JSON; like the quarantine under a suffix that is not searched for rows."""
_LISTED_MATCHES = 20


@dataclass
class BenchmarkCount:
    """Findings for one benchmark. A row counts for every benchmark that it matches."""

    num_items: int = 0
    num_too_short: int = 0
    """Items of fewer than seven words, which cannot be found by n-grams."""
    rows_13gram: int = 0
    rows_7gram: int = 0
    rows_partial: int = 0
    items_found: set[int] = field(default_factory=set)


class Tally:
    """Counts the decisions."""

    def __init__(self, detector: Detector) -> None:
        """Start with all benchmarks, none found yet."""
        self._items = detector.items
        self._contaminated = detector.thresholds.contaminated
        self.benchmarks: dict[str, BenchmarkCount] = {}
        for item, too_short in zip(detector.items, detector.too_short.tolist(), strict=True):
            count = self.benchmarks.setdefault(item.benchmark, BenchmarkCount())
            count.num_items += 1
            count.num_too_short += too_short
        self.num_partial = 0

    def decide(self, verdict: Verdict, _: Line) -> Rejection | None:
        """Return a rejection for a contaminated text; count partial matches and keep them."""
        best: dict[str, Match] = {}
        for match in verdict.matches:
            benchmark = self._items[match.item].benchmark
            best.setdefault(benchmark, match)
            if self._counts(match):
                self.benchmarks[benchmark].items_found.add(match.item)
        for benchmark, match in best.items():
            count = self.benchmarks[benchmark]
            if match.has_long:
                count.rows_13gram += 1
            elif self._counts(match):
                count.rows_7gram += 1
            else:
                count.rows_partial += 1
        self.num_partial += verdict.finding is Finding.PARTIAL
        if not verdict.finding.contaminated:
            return None
        listed = [
            _listed(match, self._items[match.item]) for match in verdict.matches[:_LISTED_MATCHES]
        ]
        details = {"matches": listed, "num_matches": len(verdict.matches)}
        return Rejection(verdict.finding.value, details)

    def _counts(self, match: Match) -> bool:
        return match.has_long or match.ratio >= self._contaminated


def learn_allowed(
    detector: Detector,
    reference: Sequence[Path],
    min_texts: int,
    *,
    row_format: RowFormat = DEFAULT_FORMAT,
    num_workers: int = 1,
) -> None:
    """Add the 13-grams that several rows of a reference corpus contain to the allow-list.

    Raises:
        DataError: a file or a row of the reference cannot be read.
    """

    def grams() -> Iterator[np.ndarray]:
        paths = [item.path for item in list_inputs(reference)]
        for line, result in analyse_rows(
            paths, detector.long_grams, row_format=row_format, num_workers=num_workers
        ):
            if isinstance(result, RowError):
                raise DataError(f"{line.path}, line {line.number}: {result}; repair the reference")
            yield result

    detector.allow_common(grams(), min_texts)


def decontaminate(
    inputs: Sequence[Path],
    detector: Detector,
    directory: Path,
    *,
    row_format: RowFormat = DEFAULT_FORMAT,
    num_workers: int = 1,
    max_bad_rows: int = MAX_BAD_ROWS,
) -> tuple[Screened, Tally]:
    """Write clean rows, quarantined rows and a report to a directory.

    Quarantined rows have the finding and the n-grams they share with each item. Memory holds the
    index of the benchmarks, once per process, and a few batches of rows.

    Raises:
        DataError, DiskFullError: see `screen`.
    """
    tally = Tally(detector)
    screened = screen(
        inputs,
        directory,
        Rule(detector.check, tally.decide),
        row_format=row_format,
        num_workers=num_workers,
        max_bad_rows=max_bad_rows,
    )
    with writing(directory / REPORT):
        (directory / REPORT).write_text(_report(detector, screened, tally), encoding="utf-8")
    return screened, tally


def _listed(match: Match, item: Item) -> dict[str, object]:
    return {
        "benchmark": item.benchmark,
        "line": item.number,
        "ratio": match.ratio,
        "ngrams": list(match.grams),
    }


def _report(detector: Detector, screened: Screened, tally: Tally) -> str:
    benchmarks = {
        name: {
            **vars(count),
            "items_found": sorted(detector.items[i].number for i in count.items_found),
        }
        for name, count in tally.benchmarks.items()
    }
    report = {
        "normalisation": detector.normalisation,
        "thresholds": asdict(detector.thresholds),
        "allowed_13grams": detector.allowed(),
        "num_rows": screened.num_rows,
        "num_kept": screened.num_kept,
        "num_partial": tally.num_partial,
        "quarantined": dict(screened.rejected),
        "benchmarks": benchmarks,
    }
    return json.dumps(report, indent=1) + "\n"
