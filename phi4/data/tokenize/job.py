"""Tokenization as an external merge sort that any number of machines can share.

Inputs are split into parts; a part becomes runs, its documents sorted by a key derived from the
seed and the document's position. Parts are the unit of resume and of work: the result does not
depend on which process read a part. The merge in key order is the shuffle, and its bytes depend
only on inputs, tokenizer and seed.
"""

import multiprocessing
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import BrokenExecutor, Future, ProcessPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import msgspec
import numpy as np

from phi4.config import TokenizerConfig
from phi4.data.files.atomic_files import write_atomically
from phi4.data.files.input_rows import Part
from phi4.data.files.inputs import check_unchanged
from phi4.data.files.rejections import RejectedRow
from phi4.data.files.token_writer import check_prefix
from phi4.data.permutation import mix, permutation_key
from phi4.data.tokenize.documents import Row, read_rows
from phi4.data.tokenize.part_report import PartReport, write_rejections
from phi4.data.tokenize.parts import (
    begin,
    read_report,
    rejections_path,
    report_path,
    run_path,
    sharing,
    work_directory,
)
from phi4.data.tokenize.plan import KEY_TYPE, RUN_TOKENS, WITHOUT_LOSS, TokenizePlan
from phi4.data.tokenize.sort_buffer import SortBuffer
from phi4.data.vocabulary.chat import encode_chat
from phi4.data.vocabulary.tokenizer import Tokenizer, load_tokenizer
from phi4.errors import DataError


@dataclass(frozen=True)
class TokenizeProgress:
    """Progress of a tokenization."""

    done_bytes: int
    total_bytes: int
    new_bytes: int
    """Bytes read since this process began."""
    num_tokens: int
    seconds: float

    @property
    def remaining_seconds(self) -> float:
        """Estimate from the average speed so far."""
        return self.seconds * (self.total_bytes - self.done_bytes) / max(1, self.new_bytes)


def tokenize_parts(
    plan: TokenizePlan,
    prefix: str | Path,
    tokenizer: TokenizerConfig,
    *,
    workers: int,
    shard: tuple[int, int] = (0, 1),
    max_rejected: int,
    follow: Callable[[TokenizeProgress], None],
) -> None:
    """Write the missing runs of one shard's parts.

    Args:
        plan: the plan; a plan already begun under this prefix must be equal.
        prefix: prefix of the pair to be written.
        tokenizer: tokenizer of the plan.
        workers: number of processes, including this one.
        shard: (index, count): of `count` jobs, this one takes every `count`-th part.
        max_rejected: number of bad rows of this shard after which it stops.
        follow: called after every part.

    Raises:
        DataError: another plan was begun here, too many rows are bad, a file is damaged or changed
            while it was read, or a worker died.
        DiskFullError: the runs do not fit on the disk.
    """
    check_prefix(prefix)
    begin(plan, prefix)
    work = work_directory(prefix)
    mine = range(shard[0], len(plan.parts), shard[1])
    sizes = {index: plan.parts[index].num_bytes for index in mine}
    reports = {index: r for index in mine if (r := read_report(work, index)) is not None}
    todo = [index for index in mine if index not in reports]
    started, total = time.monotonic(), sum(sizes.values())
    resumed = done = sum(sizes[index] for index in reports)
    rejected, tokens = sum(report.num_rejected for report in reports.values()), 0

    def check() -> None:
        if rejected > max_rejected:
            listed = rejections_path(prefix, shard)
            write_rejections(listed, plan.parts, reports)
            raise DataError(
                f"{rejected} rows are bad, at most {max_rejected} are allowed; see {listed}, then "
                "correct the inputs or raise --max-rejected"
            )

    check()
    with sharing(prefix):
        for index, report in _run(plan, work, tokenizer, todo, workers):
            reports[index] = report
            rejected, tokens = rejected + report.num_rejected, tokens + report.num_tokens
            done += sizes[index]
            check()
            follow(
                TokenizeProgress(done, total, done - resumed, tokens, time.monotonic() - started)
            )


def _run(
    plan: TokenizePlan, work: Path, tokenizer: TokenizerConfig, todo: Sequence[int], workers: int
) -> Iterator[tuple[int, PartReport]]:
    job = _Job(work, plan.text_column, plan.seed, tokenizer)
    helpers = min(workers, len(todo)) - 1
    if helpers < 1:
        yield from ((index, _tokenize_part(plan.parts[index], index, job)) for index in todo)
        return
    # A forked process would inherit the locks of this one's threads.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(helpers, mp_context=context) as pool:
        futures = [pool.submit(_tokenize_part, plan.parts[index], index, job) for index in todo]
        try:
            yield from _shared(plan, job, deque(zip(todo, futures, strict=True)))
        except BrokenExecutor:
            raise DataError(
                f"a tokenizing process was killed, probably for lack of memory; run again with "
                f"fewer --workers: finished parts in {work} are kept"
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)


def _shared(
    plan: TokenizePlan, job: "_Job", parts: deque[tuple[int, Future[PartReport]]]
) -> Iterator[tuple[int, PartReport]]:
    """Workers take parts from the front of the queue; this process cancels and does unstarted parts
    from the back."""
    while parts:
        if not parts[0][1].done() and parts[-1][1].cancel():
            index, _ = parts.pop()
            yield index, _tokenize_part(plan.parts[index], index, job)
        else:
            index, future = parts.popleft()
            yield index, future.result()


@dataclass(frozen=True)
class _Job:
    """State shared by all parts."""

    work: Path
    text_column: str | None
    seed: int | None
    tokenizer: TokenizerConfig


def _tokenize_part(part: Part, index: int, job: _Job) -> PartReport:
    tokenizer, buffer = _tools(job.tokenizer)
    runs = _Runs(job.work, index, job.seed, buffer)
    rejected: list[RejectedRow] = []
    rows, masked = 0, False
    for row in read_rows(part, job.text_column):
        rows += 1
        try:
            ids, end = _encoded(row, tokenizer)
            runs.add(ids, end)
        except DataError as error:
            rejected.append(RejectedRow(row.path, row.number, str(error)))
        else:
            masked = masked or not isinstance(row.content, str)
    runs.flush()
    check_unchanged(part.files)
    report = PartReport(
        num_runs=runs.num_runs,
        num_rows=rows,
        num_documents=runs.num_documents,
        num_tokens=runs.num_tokens,
        masked=masked,
        rejected=tuple(rejected),
    )
    write_atomically(report_path(job.work, index), msgspec.json.encode(report))
    return report


class _Runs:
    """Collects the documents of a part and writes them in sorted runs of bounded size."""

    def __init__(self, work: Path, part: int, seed: int | None, buffer: SortBuffer) -> None:
        self._work, self._part, self._seed, self._buffer = work, part, seed, buffer
        self._lengths: list[int] = []
        self._used = 0
        self.num_runs = self.num_documents = self.num_tokens = 0

    def add(self, ids: np.ndarray, end: int) -> None:
        """Add a document and the token that ends it."""
        length = ids.size + 1
        room = self._buffer.room(self._used, length)
        room[:-1], room[-1] = ids, end
        self._lengths.append(length)
        self._used += length
        if self._used >= RUN_TOKENS:
            self.flush()

    def flush(self) -> None:
        if not self._lengths:
            return
        lengths = np.array(self._lengths)
        keys = _keys(self._seed, self._part, self.num_documents, lengths.size)
        order = np.argsort(keys, kind="stable")
        table = np.empty(keys.size, dtype=KEY_TYPE)
        table["key"], table["length"] = keys[order], lengths[order]
        path = run_path(self._work, self._part, self.num_runs, "tokens")
        # The report's name is synced after them.
        tokens = self._buffer.sorted(lengths, order)
        write_atomically(path, tokens.data, sync_name=False)
        write_atomically(path.with_suffix(".keys"), table.data, sync_name=False)
        self.num_runs += 1
        self.num_documents += lengths.size
        self.num_tokens += self._used
        self._lengths, self._used = [], 0


@lru_cache(maxsize=1)
def _tools(config: TokenizerConfig) -> tuple[Tokenizer, SortBuffer]:
    return load_tokenizer(config), SortBuffer()


def _encoded(row: Row, tokenizer: Tokenizer) -> tuple[np.ndarray, int]:
    """Return ids of a document and its end, with WITHOUT_LOSS set where a conversation masks
    them."""
    if row.content is None:
        raise DataError(row.reason)
    if isinstance(row.content, str):
        return tokenizer.encode_array(row.content), tokenizer.eod_id
    chat = encode_chat(row.content, tokenizer)
    ids = np.array(chat.ids, dtype=np.uint32)
    ids[~np.array(chat.loss_mask, dtype=bool)] |= np.uint32(WITHOUT_LOSS)
    return ids, tokenizer.eod_id | WITHOUT_LOSS


def _keys(seed: int | None, part: int, first: int, count: int) -> np.ndarray:
    """Return sort keys of the documents `first` to `first + count` of a part, [count] uint64."""
    ordinal = np.arange(first, first + count, dtype=np.uint64)
    if seed is None:
        return ordinal + np.uint64(part << 40)
    key = permutation_key("documents", seed)
    return mix(ordinal ^ mix(np.full(count, part, dtype=np.uint64) ^ key[0]) ^ key[1])
