"""Which checkpoint of a run answers held-out questions best.

The decision: a preference loss falls whether or not answers get better, so the place to stop is
where most answers are right, and the start of the run is one of the candidates.
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
        score: on the questions that all candidates answered.
    """

    name: str
    checkpoint: Path
    score: Score


class CandidateRow(msgspec.Struct, frozen=True, kw_only=True):
    """A candidate in selected.json; gains are over the first one."""

    name: str
    checkpoint: str
    accuracy: float
    standard_error: float | None
    gain: float
    gain_standard_error: float | None


class Selection(msgspec.Struct, frozen=True, kw_only=True):
    """The contents of selected.json.

    Attributes:
        checkpoint: the best one; of equal ones the first.
        questions: the file.
        oracle: that graded.
        n: answers to each question.
        candidates: in their order.
    """

    checkpoint: str
    questions: str
    oracle: str
    n: int
    candidates: tuple[CandidateRow, ...]


def compare(candidates: Sequence[Candidate]) -> tuple[CandidateRow, ...]:
    """Accuracy of every candidate, and its gain over the first one."""
    first = candidates[0].score
    return tuple(_row(one, gain(first, one.score)) for one in candidates)


def best_of(rows: Sequence[CandidateRow]) -> CandidateRow:
    """The row of highest accuracy; of equal ones the first."""
    return max(rows, key=lambda row: row.accuracy)


def write_selection(path: Path, selection: Selection) -> None:
    """Write selected.json."""
    write_atomically(path, msgspec.json.format(msgspec.json.encode(selection), indent=2) + b"\n")


def read_selection(path: Path) -> Selection:
    """Read selected.json.

    Raises:
        DataError: it is not there, or damaged.
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
