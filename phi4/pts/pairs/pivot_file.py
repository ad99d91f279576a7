"""The pivots that `phi4 pts search` found, as rows of a file and as items to choose from.

The decision: the pivots of one trajectory share one array of its ids, so memory grows with
trajectories and not with pivots.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np

from phi4.errors import DataError

PIVOTS = "pivots.jsonl"


class Trials(msgspec.Struct, frozen=True):
    """Completions, and how many of them were right."""

    successes: int
    trials: int

    @property
    def share(self) -> float | None:
        """Of right ones; None without any completion."""
        return self.successes / self.trials if self.trials else None


class SearchedPivot(msgspec.Struct, frozen=True, kw_only=True):
    """What this package reads of a row of `pivots.jsonl`; other columns are ignored.

    Attributes:
        question: id of the question.
        task: of the question.
        model: that was searched.
        prompt_ids: of the question.
        answer_ids: of the trajectory.
        position: index into `answer_ids`; the pivot is the token there.
        q: probability with which the pivot was drawn.
        dp_at_confirmation: by how much the pivot raises the share of right completions.
        with_token: completions behind the pivot.
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
        task: of the question.
        model: that was searched.
        trajectory: [n] ids, prompt and answer; the same array for all pivots of a trajectory.
        num_prompt: ids of the prompt at its begin.
        end: the pivot follows `trajectory[:end]`.
        chosen: the better token; None without one.
        rejected: the worse one; None without one.
        dp: effect of the token that was searched for: above 0 it is the chosen one.
        before: share of right completions before the pivot; None where it is not known.
        after: with the token that was searched for.
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
        """The token that was searched for."""
        return self.chosen if self.dp > 0 else self.rejected


class Trajectories:
    """Arrays of ids, one for all who ask with the same ids."""

    def __init__(self) -> None:
        self._arrays: dict[bytes, np.ndarray] = {}

    def of(self, ids: Sequence[int]) -> np.ndarray:
        """The array of these ids."""
        array = np.array(ids, dtype=np.int32)
        return self._arrays.setdefault(array.tobytes(), array)


def read_pivot_files(paths: Sequence[Path]) -> Iterator[PivotItem]:
    """Yield the pivots of directories that `phi4 pts search` wrote, or of their files.

    Raises:
        DataError: a file cannot be read, or a line is no pivot.
    """
    trajectories = Trajectories()
    for path in paths:
        file = path / PIVOTS if path.is_dir() else path
        try:
            with file.open("rb") as lines:
                for number, line in enumerate(lines, start=1):
                    yield _item(line, f"{file}:{number}", trajectories)
        except OSError as error:
            raise DataError(f"pivots {file} cannot be read: {error.strerror}") from None


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
            f"{place} is no pivot: {error}; give a directory of `phi4 pts search`"
        ) from None
    after, otherwise = map(_share, (row.with_token, row.without_token))
    before = None
    if row.q is not None and after is not None and otherwise is not None:
        before = row.q * after + (1 - row.q) * otherwise
    # A row without a pair names neither token, though one of them is known.
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
    """What a row contradicts itself in; empty where it does not."""
    if not 0 <= row.position < len(row.answer_ids):
        return f"position {row.position} of {len(row.answer_ids)} ids of the answer"
    if not row.prompt_ids:
        return "prompt_ids is empty"
    if row.dp_at_confirmation == 0:
        return "dp_at_confirmation is 0"
    side = "chosen_id" if row.dp_at_confirmation > 0 else "rejected_id"
    named, token = getattr(row, side), row.answer_ids[row.position]
    if named not in (None, token):
        return f"{side} is {named}, the token at its position, of this sign of dp, is {token}"
    return ""


_DECODER = msgspec.json.Decoder(SearchedPivot)
