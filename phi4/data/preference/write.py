"""Write preference rows to a token file, in input order; the file is complete or not written.

Every row is a document of the file or is listed with a reason: the two counts add up to the rows
that were read. Rows are never truncated.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from phi4.data.files.input_rows import InputRow, list_parts, read_input_rows
from phi4.data.files.inputs import FoundInputs, check_unchanged
from phi4.data.files.manifest import ShardManifest
from phi4.data.files.rejections import (
    RejectedRow,
    num_faults,
    rejected_path,
    why_nothing,
    write_rejected_rows,
)
from phi4.data.files.token_writer import TokenFileWriter, check_prefix, existing_file
from phi4.data.preference.encode import PreferenceDocument, encode_preference
from phi4.data.rows.forms import PREFERENCE_FORM_COLUMNS
from phi4.data.vocabulary.chat import chat_template_sha256
from phi4.data.vocabulary.tokenizer import Tokenizer
from phi4.errors import DataError


@dataclass(frozen=True)
class WrittenPreferences:
    """Counts of the written rows.

    Attributes:
        manifest: manifest of the token file.
        num_rows: rows read, blank lines included.
        num_preferences: pairs or pivots written.
        mean_labels: mean number of labels that a document occupies in a row.
        max_labels: labels of the longest document.
        reasons: number of rejected rows by the common part of the reason.
    """

    manifest: ShardManifest
    num_rows: int
    num_preferences: int
    mean_labels: float
    max_labels: int
    reasons: Counter[str]


def write_preferences(
    inputs: FoundInputs,
    prefix: str | Path,
    tokenizer: Tokenizer,
    *,
    row_tokens: int,
    max_rejected: int,
    overwrite: bool = False,
) -> WrittenPreferences:
    """Write `PREFIX.bin/.idx` with manifest, and `PREFIX.rejected.jsonl` if rows were rejected.

    Args:
        inputs: from `find_inputs`.
        prefix: prefix of the token file.
        tokenizer: tokenizer of its ids.
        row_tokens: labels per row of a batch.
        max_rejected: number of bad rows after which it stops.
        overwrite: replace an existing token file.

    Raises:
        DataError: such a file exists, the inputs mix pairs and pivots, no row is a
            preference, too many are bad, or an input is damaged or changed while it was read.
        DiskFullError: the files do not fit on the disk.
    """
    check_prefix(prefix)
    if not overwrite and (existing := existing_file(prefix)):
        raise DataError(f"{existing} exists; give another --out, or --overwrite to replace it")
    job = _PreferenceJob(prefix, tokenizer, row_tokens, max_rejected)
    with ExitStack() as stack:
        for row in _rows(inputs):
            job.take(row, stack)
        write_rejected_rows(rejected_path(prefix), job.rejected)
        if job.writer is None:
            why = why_nothing(prefix, job.num_rows, job.rejected, "preference")
            raise DataError(f"nothing to write to {prefix}: {why}")
        job.writer.describe(
            num_rejected=len(job.rejected),
            chat_template_sha256=chat_template_sha256() if job.uses_chat_format else None,
        )
    lengths = np.array(job.lengths)
    return WrittenPreferences(
        manifest=job.writer.manifest,
        num_rows=job.num_rows,
        num_preferences=job.num_preferences,
        mean_labels=float(lengths.mean()),
        max_labels=int(lengths.max()),
        reasons=Counter(row.reason.partition(":")[0] for row in job.rejected),
    )


def _rows(inputs: FoundInputs) -> Iterator[InputRow]:
    # One part per file, so that rows are numbered as in the file.
    whole = max((file.num_bytes for file in inputs.files), default=0) + 1
    for part in list_parts(inputs.files, whole):
        yield from read_input_rows(part, PREFERENCE_FORM_COLUMNS)
        check_unchanged(part.files)


@dataclass
class _PreferenceJob:
    """Writes rows as they arrive; the first good one determines the kind of the file."""

    prefix: str | Path
    tokenizer: Tokenizer
    row_tokens: int
    max_rejected: int
    writer: TokenFileWriter | None = None
    kind: str = ""
    first: str = ""
    num_rows: int = 0
    num_bad: int = 0
    num_preferences: int = 0
    uses_chat_format: bool = False
    lengths: list[int] = field(default_factory=list)
    rejected: list[RejectedRow] = field(default_factory=list)

    def take(self, row: InputRow, stack: ExitStack) -> None:
        """Write a row, or list it as rejected; the writer is entered on the stack."""
        self.num_rows += 1
        try:
            document = encode_preference(_columns(row), self.tokenizer, self.row_tokens)
        except DataError as error:
            self._reject(RejectedRow(row.path, row.number, str(error)))
            return
        self._require_kind(document, f"{row.path}:{row.number}")
        if self.writer is None:
            writer = TokenFileWriter(self.prefix, self.tokenizer.facts, kind=document.kind)
            self.writer = stack.enter_context(writer)
        lengths = [sequence.size for sequence in document.sequences]
        self.writer.add_many(np.concatenate(document.sequences), lengths, document.loss_mask)
        self.lengths.append(document.num_labels)
        self.num_preferences += document.num_preferences
        self.uses_chat_format |= document.uses_chat_format

    def _reject(self, row: RejectedRow) -> None:
        self.rejected.append(row)
        self.num_bad += num_faults([row])
        if self.num_bad > self.max_rejected:
            listed = rejected_path(self.prefix)
            write_rejected_rows(listed, self.rejected)
            raise DataError(
                f"more than {self.max_rejected} rows are bad; see {listed}, then correct the "
                "inputs or raise --max-rejected"
            )

    def _require_kind(self, document: PreferenceDocument, place: str) -> None:
        if not self.first:
            self.kind, self.first = document.kind, place
        if document.kind != self.kind:
            raise DataError(
                f"the inputs mix {self.kind} and {document.kind}: {self.first} has the first kind, "
                f"{place} the second; write each kind to its own prefix"
            )


def _columns(row: InputRow) -> dict[str, object]:
    if row.content is None:
        raise DataError(row.reason)
    if isinstance(row.content, str):
        raise DataError("a text file holds no preference; remove it from the inputs")
    return row.content
