"""Read the pivots found by `phi4 pts search`, as rows of a file and as items to choose from.

The pivots of one trajectory share one array of its ids, so memory is proportional to the
trajectories and not to the pivots.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np

from phi4.errors import DataError

PIVOTS = "pivots.jsonl"


class Trials(msgspec.Struct, frozen=True):
    """A number of completions, and how many of them were right."""

    successes: int
    trials: int

    @property
    def share(self) -> float | None:
        """Fraction of right ones; None without any completion."""
        return self.successes / self.trials if self.trials else None


class SearchedPivot(msgspec.Struct, frozen=True, kw_only=True):
    """The columns of a `pivots.jsonl` row used here; others are ignored.

    Attributes:
        question: id of the question.
        task: task of the question.
        model: identity of the searched model.
        prompt_ids: prompt ids of the question.
        answer_ids: answer ids of the trajectory.
        position: index into `answer_ids`; the pivot is the token there.
        q: probability with which the pivot was drawn.
        dp_at_confirmation: change of the fraction of right completions by the pivot.
        with_token: completions after the pivot.
        without_token: completions that begin with another token.
        chosen_id: the better token of the pair; None without a pair.
        rejected_id: the worse token of the pair; None without a pair.
        no_pair_reason: why there is no pair; empty with one.
    """

    question: str
    prompt_ids: list[int]
    answer_ids: list[int]
    position: int
    chosen_id: int | None
    rejected_id: int | None
    dp_at_confirmation: float
    task: str = ""
    model: str = ""
    no_pair_reason: str = ""
    q: float | None = None
    with_token: Trials | None = None
    without_token: Trials | None = None


@dataclass(frozen=True, eq=False)
class PivotItem:
    """One pivot.

    Attributes:
        question: id of the question.
        task: task of the question.
        model: identity of the searched model.
        trajectory: [n] ids, prompt and answer; one array shared by all pivots of a trajectory.
        num_prompt: number of prompt ids at its beginning.
        end: the pivot follows `trajectory[:end]`.
        chosen: the better token; None without one.
        rejected: the worse one; None without one.
        dp: effect of the searched token: if above 0, it is the chosen one.
        before: fraction of right completions before the pivot; None if unknown.
        after: fraction with the searched token.
        no_pair_reason: why one of the tokens is None; may be empty.
    """

    question: str
    task: str
    model: str
    trajectory: np.ndarray
    num_prompt: int
    end: int
    chosen: int | None
    rejected: int | None
    dp: float
    before: float | None = None
    after: float | None = None
    no_pair_reason: str = ""

    @property
    def prefix(self) -> np.ndarray:
        """[end] ids before the pivot."""
        return self.trajectory[: self.end]

    @property
    def token(self) -> int | None:
        """The searched token."""
        return self.chosen if self.dp > 0 else self.rejected


class Trajectories:
    """Interned arrays of ids: equal ids share one array."""

    def __init__(self) -> None:
        self._arrays: dict[bytes, np.ndarray] = {}

    def of(self, ids: Sequence[int]) -> np.ndarray:
        """Return the array of these ids."""
        array = np.array(ids, dtype=np.int32)
        return self._arrays.setdefault(array.tobytes(), array)


def read_pivot_files(paths: Sequence[Path]) -> Iterator[PivotItem]:
    """Yield the pivots of directories that `phi4 pts search` wrote, or of their files.

    Raises:
        DataError: a file cannot be read, or a line is not a pivot.
    """
    trajectories = Trajectories()
    for path in paths:
        file = path / PIVOTS if path.is_dir() else path
        try:
            with file.open("rb") as lines:
                for number, line in enumerate(lines, start=1):
                    yield _item(line, f"{file}:{number}", trajectories)
        except OSError as error:
            raise DataError(
                f"pivots {file} cannot be read: {error.strerror}; give a directory of "
                f"`phi4 pts search`"
            ) from None


def _share(trials: Trials | None) -> float | None:
    return None if trials is None else trials.share


def _item(line: bytes, place: str, trajectories: Trajectories) -> PivotItem:
    try:
        row = _DECODER.decode(line)
        if fault := _fault(row):
            raise DataError(fault)
        trajectory = trajectories.of([*row.prompt_ids, *row.answer_ids])
    except (msgspec.DecodeError, UnicodeDecodeError, OverflowError, DataError) as error:
        raise DataError(
            f"{place} is not a pivot: {error}; give a directory of `phi4 pts search`"
        ) from None
    after, otherwise = map(_share, (row.with_token, row.without_token))
    before = None
    if row.q is not None and after is not None and otherwise is not None:
        before = row.q * after + (1 - row.q) * otherwise
    # A row without a pair has neither token, though one of them is known.
    raises = row.dp_at_confirmation > 0
    token = row.answer_ids[row.position]
    other = row.rejected_id if raises else row.chosen_id
    return PivotItem(
        question=row.question,
        task=row.task,
        model=row.model,
        trajectory=trajectory,
        num_prompt=len(row.prompt_ids),
        end=len(row.prompt_ids) + row.position,
        chosen=token if raises else other,
        rejected=other if raises else token,
        dp=row.dp_at_confirmation,
        before=before,
        after=after,
        no_pair_reason=row.no_pair_reason,
    )


def _fault(row: SearchedPivot) -> str:
    """Return the contradiction in a row; empty if there is none."""
    if not 0 <= row.position < len(row.answer_ids):
        return f"position {row.position} of {len(row.answer_ids)} ids of the answer"
    if not row.prompt_ids:
        return "prompt_ids is empty"
    if row.dp_at_confirmation == 0:
        return "dp_at_confirmation is 0"
    side = "chosen_id" if row.dp_at_confirmation > 0 else "rejected_id"
    named, token = getattr(row, side), row.answer_ids[row.position]
    if named not in (None, token):
        return f"{side} is {named}, but the token at its position with this sign of dp is {token}"
    return ""


_DECODER = msgspec.json.Decoder(SearchedPivot)
