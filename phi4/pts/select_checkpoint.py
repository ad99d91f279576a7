"""Select the checkpoint of a run that answers held-out questions best.

A preference loss falls whether or not answers improve, so the best checkpoint is the one with the
highest accuracy, with the start of the run as one of the candidates.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from phi4.data.files.atomic_files import write_atomically
from phi4.errors import DataError
from phi4.pts.score import Estimate, Score, gain


@dataclass(frozen=True)
class Candidate:
    """A checkpoint and the score of its answers.

    Attributes:
        name: `start`, or the checkpoint's.
        checkpoint: its directory.
        score: score on the questions that all candidates answered.
    """

    name: str
    checkpoint: Path
    score: Score


class CandidateRow(msgspec.Struct, frozen=True, kw_only=True):
    """A candidate in selected.json; gains are relative to the first one."""

    name: str
    checkpoint: str
    accuracy: float
    standard_error: float | None
    gain: float
    gain_standard_error: float | None


class Selection(msgspec.Struct, frozen=True, kw_only=True):
    """The content of selected.json.

    Attributes:
        checkpoint: the best one; the first among equals.
        questions: the file of questions.
        oracle: the grading oracle.
        n: answers per question.
        candidates: in order.
    """

    checkpoint: str
    questions: str
    oracle: str
    n: int
    candidates: tuple[CandidateRow, ...]


def compare(candidates: Sequence[Candidate]) -> tuple[CandidateRow, ...]:
    """Return the accuracy of every candidate, and its gain over the first one."""
    first = candidates[0].score
    return tuple(_row(one, gain(first, one.score)) for one in candidates)


def best_of(rows: Sequence[CandidateRow]) -> CandidateRow:
    """Return the row of highest accuracy; the first among equals."""
    return max(rows, key=lambda row: row.accuracy)


def write_selection(path: Path, selection: Selection) -> None:
    """Write selected.json."""
    write_atomically(path, msgspec.json.format(msgspec.json.encode(selection), indent=2) + b"\n")


def read_selection(path: Path) -> Selection:
    """Read selected.json.

    Raises:
        DataError: it is missing or damaged.
    """
    try:
        return msgspec.json.decode(path.read_bytes(), type=Selection)
    except OSError as error:
        raise DataError(
            f"{path} cannot be read ({error.strerror}); run `phi4 pts select` on the run first"
        ) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is damaged: {error}; run `phi4 pts select` again") from None


def _row(candidate: Candidate, compared: Estimate) -> CandidateRow:
    accuracy = candidate.score.accuracy
    return CandidateRow(
        name=candidate.name,
        checkpoint=str(candidate.checkpoint),
        accuracy=accuracy.mean,
        standard_error=accuracy.standard_error,
        gain=compared.mean,
        gain_standard_error=compared.standard_error,
    )
