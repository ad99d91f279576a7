"""Merge tokenized runs into one `.bin/.idx` pair, in key order and bounded memory.

Runs are sorted, so the documents of a range of keys are one slice of each run: the merge iterates
over ranges, reads a slice of every run, and sorts these documents. In addition to a range it holds
the key and the length of every document; no run stays open, so there may be more runs than the
limit of open files.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from phi4.data.files.inputs import PLAN_FILE
from phi4.data.files.manifest import ShardManifest, read_manifest
from phi4.data.files.rejections import rejected_path, why_nothing
from phi4.data.files.token_writer import TokenFileWriter
from phi4.data.tokenize.part_report import PartReport, write_rejections
from phi4.data.tokenize.parts import (
    discard,
    keep_plan,
    read_plan,
    read_report,
    run_path,
    sharing,
    work_directory,
)
from phi4.data.tokenize.plan import KEY_TYPE, WITHOUT_LOSS, TokenizePlan
from phi4.data.tokenize.sort_buffer import SortBuffer
from phi4.data.vocabulary.chat import chat_template_sha256
from phi4.errors import DataError

_SAMPLES_PER_RUN = 64


def merge_runs(prefix: str | Path, range_tokens: int = 1 << 22) -> ShardManifest:
    """Merge the runs under `PREFIX.work` into `PREFIX.bin/.idx` and remove them.

    Without a work directory, an existing pair is assumed to be merged.

    Args:
        prefix: prefix of the pair.
        range_tokens: approximate number of tokens that are sorted at a time.

    Raises:
        DataError: there is no work directory, a part is not finished, there is no document, or
            another job is merging the same runs.
        DiskFullError: the pair does not fit on the disk.
    """
    work = work_directory(prefix)
    if not (work / PLAN_FILE).exists() and (manifest := read_manifest(prefix)):
        return manifest
    plan, reports = _finished(work)
    with sharing(prefix):
        rejected = write_rejections(rejected_path(prefix), plan.parts, reports)
        if not any(report.num_documents for report in reports.values()):
            discard(prefix, plan)
            rows = [row for report in reports.values() for row in report.rejected]
            num_rows = sum(report.num_rows for report in reports.values())
            why = why_nothing(prefix, num_rows, rows, "document")
            raise DataError(f"nothing to write to {prefix}: {why}")
        manifest = _merged(prefix, plan, reports, rejected, range_tokens)
        keep_plan(plan, prefix)
        discard(prefix, plan)
    return manifest


def _merged(
    prefix: str | Path,
    plan: TokenizePlan,
    reports: dict[int, PartReport],
    num_rejected: int,
    range_tokens: int,
) -> ShardManifest:
    runs = [
        _SortedRun.open(work_directory(prefix), part, run)
        for part, report in sorted(reports.items())
        for run in range(report.num_runs)
    ]
    masked = any(report.masked for report in reports.values())
    with TokenFileWriter(
        prefix,
        plan.tokenizer,
        num_rejected=num_rejected,
        shuffle_seed=plan.seed,
        chat_template_sha256=chat_template_sha256() if masked else None,
    ) as writer:
        for tokens, lengths in _sorted_ranges(runs, range_tokens):
            loss_mask = (tokens & WITHOUT_LOSS) == 0 if masked else None
            writer.add_many(tokens & (WITHOUT_LOSS - 1) if masked else tokens, lengths, loss_mask)
    return writer.manifest


@dataclass(eq=False)
class _SortedRun:
    """A sorted run and its read position."""

    path: Path
    keys: np.ndarray
    lengths: np.ndarray
    num_tokens: int
    document: int = 0
    token: int = 0

    @staticmethod
    def open(work: Path, part: int, run: int) -> "_SortedRun":
        path = run_path(work, part, run, "tokens")
        table = np.fromfile(path.with_suffix(".keys"), dtype=KEY_TYPE)
        found, expected = path.stat().st_size // 4, int(table["length"].sum(dtype=np.int64))
        if found != expected:
            raise DataError(
                f"{path} holds {found} tokens, but its keys describe {expected}; remove {work} and "
                "tokenize again"
            )
        return _SortedRun(path, table["key"], table["length"], expected)

    def take(self, end: int | None) -> tuple[np.ndarray, np.ndarray]:
        """Return keys and lengths of the documents below a key; of all remaining ones for None."""
        first, self.document = self.document, self.keys.size
        if end is not None:
            self.document = int(self.keys.searchsorted(np.uint64(end)))
        taken = slice(first, self.document)
        return self.keys[taken], self.lengths[taken]

    def read(self, room: np.ndarray) -> None:
        """Return the next tokens."""
        with open(self.path, "rb") as stream:
            stream.seek(4 * self.token)
            stream.readinto(room.data)
        self.token += room.size


def _sorted_ranges(
    runs: list[_SortedRun], range_tokens: int
) -> Iterator[tuple[np.ndarray, list[int]]]:
    """Yield tokens and lengths of the documents in key order, range by range; tokens are
    overwritten."""
    buffer = SortBuffer()
    for end in [*_boundaries(runs, range_tokens), None]:
        taken = [run.take(end) for run in runs]
        used = 0
        for run, (_, lengths) in zip(runs, taken, strict=True):
            num_tokens = int(lengths.sum(dtype=np.int64))
            if num_tokens:
                run.read(buffer.room(used, num_tokens))
                used += num_tokens
        keys, lengths = (np.concatenate(column) for column in zip(*taken, strict=True))
        if keys.size:
            order = np.argsort(keys, kind="stable")
            yield buffer.sorted(lengths, order), lengths[order].tolist()


def _boundaries(runs: list[_SortedRun], range_tokens: int) -> list[int]:
    """Return keys that split the documents into ranges of about equal numbers of tokens."""
    num_ranges = -(-sum(run.num_tokens for run in runs) // range_tokens)
    places = [np.linspace(0, run.keys.size - 1, _SAMPLES_PER_RUN).astype(int) for run in runs]
    samples = [run.keys[place] for run, place in zip(runs, places, strict=True)]
    weights = np.repeat([run.num_tokens for run in runs], _SAMPLES_PER_RUN)
    keys = np.concatenate(samples)
    order = np.argsort(keys, kind="stable")
    filled = np.cumsum(weights[order])
    targets = filled[-1] * np.arange(1, num_ranges) / num_ranges
    return keys[order][np.searchsorted(filled, targets)].tolist()


def _finished(work: Path) -> tuple[TokenizePlan, dict[int, PartReport]]:
    try:
        plan = read_plan(work)
    except FileNotFoundError:
        raise DataError(f"{work} does not exist; begin with `phi4 data tokenize`") from None
    if plan is None:
        raise DataError(
            f"{work} was created by another version of phi4; remove it and tokenize again"
        )
    found = {index: read_report(work, index) for index in range(len(plan.parts))}
    reports = {index: report for index, report in found.items() if report is not None}
    missing = [index for index in found if index not in reports]
    if missing:
        raise DataError(
            f"{len(missing)} of {len(plan.parts)} parts in {work} are not tokenized, the first is "
            f"part {missing[0]}; run the missing shards again"
        )
    return plan, reports
