"""Tokenization as an external merge sort that any number of machines can share.

Inputs are cut into parts; a part becomes runs, its documents sorted by a key that the seed and the
document's place define. Parts are the unit of resume and of work: who read one leaves no trace. The
merge in key order is the shuffle, and its bytes depend on inputs, tokenizer and seed alone.
"""

import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import msgspec
import numpy as np

from phi4.config import TokenizerConfig
from phi4.data.chat import encode_chat
from phi4.data.documents import Part, Row, read_rows
from phi4.data.permutation import mix, permutation_key
from phi4.data.token_plan import (
    KEY_TYPE,
    NOT_LEARNT,
    RUN_TOKENS,
    PartReport,
    Plan,
    Rejection,
    read_report,
    report_path,
    run_path,
    work_directory,
    write_rejections,
)
from phi4.data.token_writer import write_atomically
from phi4.data.tokenizer import Tokenizer, load_tokenizer
from phi4.errors import DataError


@dataclass(frozen=True)
class Progress:
    """Where a tokenization stands."""

    done_bytes: int
    total_bytes: int
    new_bytes: int
    """Read since this process began."""
    num_tokens: int
    seconds: float

    @property
    def remaining_seconds(self) -> float:
        """At the pace so far."""
        return self.seconds * (self.total_bytes - self.done_bytes) / max(1, self.new_bytes)


def tokenize_parts(
    plan: Plan,
    prefix: str | Path,
    tokenizer: TokenizerConfig,
    *,
    workers: int,
    shard: tuple[int, int] = (0, 1),
    max_rejected: int,
    follow: Callable[[Progress], None],
) -> None:
    """Write the runs of one shard's parts, those that are missing.

    Args:
        plan: what to do; a plan that was begun under this prefix must be the same.
        prefix: of the pair to be written.
        tokenizer: that of the plan.
        workers: processes.
        shard: (index, count): of `count` jobs, this one takes every `count`-th part.
        max_rejected: bad rows of this shard after which it stops.
        follow: told after every part.

    Raises:
        DataError: another plan was begun here, too many rows are bad, a file is damaged, or a
            worker died.
    """
    work = work_directory(prefix)
    _begin(plan, work)
    mine = range(shard[0], len(plan.parts), shard[1])
    sizes = {index: plan.parts[index].num_bytes for index in mine}
    reports = {index: r for index in mine if (r := read_report(work, index)) is not None}
    todo = [index for index in mine if index not in reports]
    started, total = time.monotonic(), sum(sizes.values())
    resumed = done = sum(sizes[index] for index in reports)
    rejected, tokens = sum(report.num_rejected for report in reports.values()), 0

    def check() -> None:
        if rejected > max_rejected:
            write_rejections(f"{prefix}.rejected.jsonl", plan, reports)
            raise DataError(
                f"{rejected} rows are bad, at most {max_rejected} are allowed; see "
                f"{prefix}.rejected.jsonl, then mend the inputs or raise --max-rejected"
            )

    check()
    for index, report in _run(plan, work, tokenizer, todo, workers):
        reports[index] = report
        rejected, tokens = rejected + report.num_rejected, tokens + report.num_tokens
        done += sizes[index]
        check()
        follow(Progress(done, total, done - resumed, tokens, time.monotonic() - started))


def _begin(plan: Plan, work: Path) -> None:
    path, content = work / "plan.json", msgspec.json.encode(plan)
    if path.exists() and path.read_bytes() != content:
        raise DataError(
            f"{work} was begun with other inputs, tokenizer or options; go on with those, or "
            "remove it to start anew"
        )
    work.mkdir(parents=True, exist_ok=True)
    write_atomically(path, content)


def _run(
    plan: Plan, work: Path, tokenizer: TokenizerConfig, todo: Sequence[int], workers: int
) -> Iterator[tuple[int, PartReport]]:
    if workers == 1 or len(todo) < 2:
        for index in todo:
            yield index, _tokenize_part(plan.parts[index], plan, work, tokenizer, index)
        return
    # A forked process would inherit the threads' locks of this one.
    context = multiprocessing.get_context("spawn")
    small = msgspec.structs.replace(plan, parts=(), input_stats=())
    with ProcessPoolExecutor(min(workers, len(todo)), mp_context=context) as pool:
        futures = {
            pool.submit(_tokenize_part, plan.parts[index], small, work, tokenizer, index): index
            for index in todo
        }
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BrokenExecutor:
            raise DataError(
                f"a tokenizing process was killed, probably for memory; run again with fewer "
                f"--workers: what is done in {work} is kept"
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)


def _tokenize_part(
    part: Part, plan: Plan, work: Path, config: TokenizerConfig, index: int
) -> PartReport:
    tokenizer = _loaded(config)
    runs = _Runs(work, index, plan.seed)
    rejected: list[Rejection] = []
    rows, masked = 0, False
    for row in read_rows(part, plan.text_field):
        rows += 1
        try:
            runs.add(_encoded(row, tokenizer))
        except DataError as error:
            rejected.append(Rejection(row.path, row.number, str(error)))
        else:
            masked = masked or not isinstance(row.content, str)
    runs.flush()
    report = PartReport(
        num_runs=runs.num_runs,
        num_rows=rows,
        num_documents=runs.num_documents,
        num_tokens=runs.num_tokens,
        masked=masked,
        rejected=tuple(rejected),
    )
    write_atomically(report_path(work, index), msgspec.json.encode(report))
    return report


class _Runs:
    """Collects the documents of a part and writes them in sorted runs of bounded size."""

    def __init__(self, work: Path, part: int, seed: int | None) -> None:
        self._work, self._part, self._seed = work, part, seed
        self._ids: list[np.ndarray] = []
        self._buffered = 0
        self.num_runs = self.num_documents = self.num_tokens = 0

    def add(self, ids: np.ndarray) -> None:
        self._ids.append(ids)
        self._buffered += ids.size
        if self._buffered >= RUN_TOKENS:
            self.flush()

    def flush(self) -> None:
        if not self._ids:
            return
        keys = _keys(self._seed, self._part, self.num_documents, len(self._ids))
        order = np.argsort(keys, kind="stable")
        table = np.empty(keys.size, dtype=KEY_TYPE)
        table["key"] = keys[order]
        table["length"] = [self._ids[place].size for place in order]
        joined = np.concatenate([self._ids[place] for place in order]).astype("<i4")
        path = run_path(self._work, self._part, self.num_runs, "tokens")
        write_atomically(path, joined.data)
        write_atomically(path.with_suffix(".keys"), table.tobytes())
        self.num_runs += 1
        self.num_documents += len(self._ids)
        self.num_tokens += self._buffered
        self._ids, self._buffered = [], 0


@lru_cache(maxsize=1)
def _loaded(config: TokenizerConfig) -> Tokenizer:
    return load_tokenizer(config)


def _encoded(row: Row, tokenizer: Tokenizer) -> np.ndarray:
    """Ids of a document and its end, with NOT_LEARNT set where a conversation masks them."""
    if row.content is None:
        raise DataError(row.reason)
    if isinstance(row.content, str):
        return np.append(tokenizer.encode_array(row.content), np.uint32(tokenizer.eod_id))
    chat = encode_chat(row.content, tokenizer)
    ids = np.array([*chat.ids, tokenizer.eod_id], dtype=np.uint32)
    ids[~np.array([*chat.learnt, False])] |= np.uint32(NOT_LEARNT)
    return ids


def _keys(seed: int | None, part: int, first: int, count: int) -> np.ndarray:
    """Sort keys of the documents `first` to `first + count` of a part, [count] uint64."""
    ordinal = np.arange(first, first + count, dtype=np.uint64)
    if seed is None:
        return ordinal + np.uint64(part << 40)
    key = permutation_key("documents", seed)
    return mix(ordinal ^ mix(np.full(count, part, dtype=np.uint64) ^ key[0]) ^ key[1])
