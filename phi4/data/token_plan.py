"""The plan of a tokenization and what lies in its work directory.

`PREFIX.work` holds the plan, one report per finished part and the runs that the report counts. Jobs
on several machines share nothing else, and a resumed job needs nothing else.
"""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np

from phi4.data.documents import BLANK, Part, list_parts
from phi4.data.token_writer import write_atomically
from phi4.data.tokenizer import TokenizerFacts

NOT_LEARNT = 1 << 30
"""Bit of a run's ids that masks the token out of the loss; no vocabulary reaches it."""
RUN_TOKENS = 1 << 24
KEY_TYPE = np.dtype([("key", "<u8"), ("length", "<i4")])


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """What a tokenization does; kept as plan.json beside its runs."""

    format_version: int = 1
    parts: tuple[Part, ...]
    input_stats: tuple[tuple[str, int, int], ...]
    """Path, bytes and time of change of every input."""
    tokenizer: TokenizerFacts
    text_field: str
    seed: int | None


class Rejection(msgspec.Struct, frozen=True):
    """A row that became no document."""

    input: str
    line: int
    reason: str


class PartReport(msgspec.Struct, frozen=True, kw_only=True):
    """A finished part."""

    num_runs: int
    num_rows: int
    num_documents: int
    num_tokens: int
    masked: bool
    rejected: tuple[Rejection, ...]

    @property
    def num_rejected(self) -> int:
        """Bad rows; blank ones are no fault."""
        return sum(row.reason != BLANK for row in self.rejected)


def work_directory(prefix: str | Path) -> Path:
    """Where the runs of `PREFIX.bin` lie until they are merged."""
    return Path(f"{prefix}.work")


def make_plan(
    inputs: Sequence[str | Path],
    tokenizer: TokenizerFacts,
    *,
    text_field: str = "text",
    seed: int | None = 0,
    **cut: int,
) -> Plan:
    """Plan a tokenization.

    Args:
        inputs: files and directories.
        tokenizer: that encodes them.
        text_field: column that holds the text.
        seed: of the shuffle; None keeps the order of the inputs.
        cut: `part_bytes` of `list_parts`.

    Raises:
        DataError: an input is missing.
    """
    parts = tuple(list_parts(inputs, **cut))
    paths = sorted({path for part in parts for path in part.paths})
    stats = [(path, os.stat(path)) for path in paths]
    return Plan(
        parts=parts,
        input_stats=tuple((path, stat.st_size, stat.st_mtime_ns) for path, stat in stats),
        tokenizer=tokenizer,
        text_field=text_field,
        seed=seed,
    )


def read_report(work: Path, index: int) -> PartReport | None:
    """The report of a part, None while it is not finished."""
    try:
        return msgspec.json.decode(report_path(work, index).read_bytes(), type=PartReport)
    except FileNotFoundError:
        return None


def write_rejections(path: str, plan: Plan, reports: dict[int, PartReport]) -> int:
    """Write all rejections, lines counted from the begin of their file; returns how many.

    No file is left where there are none.
    """
    lines, before, last = [], 0, ""
    for index in sorted(reports):
        first = plan.parts[index].paths[0]
        before, last = (before if first == last else 0), first
        for row in reports[index].rejected:
            line = row.line + before if row.line else 0
            lines.append(msgspec.json.encode(Rejection(row.input, line, row.reason)) + b"\n")
        before += reports[index].num_rows
    if lines:
        write_atomically(path, b"".join(lines))
    else:
        Path(path).unlink(missing_ok=True)
    return len(lines)


def run_path(work: Path, part: int, run: int, suffix: str) -> Path:
    """A file of one run: `tokens`, int32, or `keys`, KEY_TYPE."""
    return work / f"{part:06}-{run:04}.{suffix}"


def discard(prefix: str | Path) -> None:
    """Remove the work directory."""
    shutil.rmtree(work_directory(prefix))


def report_path(work: Path, index: int) -> Path:
    return work / f"{index:06}.json"
