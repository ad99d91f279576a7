"""The files of a search: a row per pivot, a row per trajectory.

Rows are in token ids, with texts only for human readers. Code that makes pairs from them neither
splits nor encodes text.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from phi4.data.vocabulary.tokenizer import Tokenizer
from phi4.errors import DataError
from phi4.pts.search.pivots import Pivot
from phi4.pts.search.question import QuestionFound, SearchCost
from phi4.pts.search.rollouts import Share
from phi4.sampling.questions import KeyedQuestion

PIVOTS_NAME = "pivots.jsonl"
TRAJECTORIES_NAME = "trajectories.jsonl"
REPORT_NAME = "report.json"

Row = TypeVar("Row", bound=msgspec.Struct)


class CountRow(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Successes among completions that could be graded."""

    successes: int
    trials: int


class CounterpartRow(CountRow, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The other token of a pair, and the results of the completions after it."""

    id: int


class PivotRow(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A token that changes the probability of a right answer.

    Attributes:
        question: id of the question.
        task: task of the question.
        model: identity of the model.
        trajectory: id of the trajectory.
        prompt_ids: prompt ids of the question.
        answer_ids: the complete trajectory; the pivot's prefix is its first `position` ids.
        position: position of the token in `answer_ids`.
        token: the pivot, `answer_ids[position]`.
        token_text: for human readers.
        sign: `raises` or `lowers` the probability.
        q: probability of the token in the sampler's distribution.
        dp_at_confirmation: change of the probability when the test stopped. Biased away from 0,
            because a test stops at extremes: not an estimate of the effect.
        e_value: e value of the test against no effect; null if the mode confirms nothing.
        with_token: completions after the token; for a final token only the verdict.
        without_token: completions after other tokens in its position.
        counterpart: the other token of the pair; null without a pair.
        counterpart_text: for human readers.
        no_pair_reason: why there is no pair; empty with one.
        chosen_id: the token of the pair that is better; null without a pair.
        rejected_id: the other one.
    """

    question: str
    task: str
    model: str
    trajectory: str
    prompt_ids: list[int]
    answer_ids: list[int]
    position: int
    token: int
    token_text: str
    sign: str
    q: float
    dp_at_confirmation: float
    e_value: float | None
    with_token: CountRow
    without_token: CountRow
    counterpart: CounterpartRow | None
    counterpart_text: str
    no_pair_reason: str
    chosen_id: int | None
    rejected_id: int | None


class PointRow(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The probability of a right answer after the first `position` tokens.

    Attributes:
        position: tokens before it.
        successes: number among `trials`.
        trials: completions.
        source: `tree`, `confirm`, or `verdict` for the oracle's verdict on the complete answer.
    """

    position: int
    successes: int
    trials: int
    source: str


class PivotMark(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A pivot of a trajectory, for plots."""

    position: int
    dp_at_confirmation: float


class TrajectoryRow(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An answer that was searched.

    Attributes:
        trajectory: its id.
        question: id of the question.
        prompt: the question's text for human readers; empty if only ids were given.
        is_right: the oracle's verdict.
        ids: token ids of the answer.
        texts: text of each id, for human readers; bytes that are not a character are shown as
            \\xNN.
        log_probs: log probs of `ids` in the sampler's distribution.
        points: where the probability was measured, by position.
        pivots: by position.
    """

    trajectory: str
    question: str
    prompt: str
    is_right: bool
    ids: list[int]
    texts: list[str]
    log_probs: list[float]
    points: list[PointRow]
    pivots: list[PivotMark]


class QuestionRows(msgspec.Struct, frozen=True, kw_only=True):
    """Stored rows of a searched question; `cost` as in `SearchCost`."""

    dropped: str
    pivots: list[PivotRow]
    trajectories: list[TrajectoryRow]
    num_candidates: int
    num_confirmed: int
    num_reused: int
    cost: SearchCost


def rows_of(
    question: KeyedQuestion, found: QuestionFound, model: str, tokenizer: Tokenizer
) -> QuestionRows:
    """Return the rows of a question.

    Args:
        question: the searched question.
        found: its result.
        model: identity of the model.
        tokenizer: tokenizer of the ids.
    """
    trajectories = []
    for index, one in enumerate(found.trajectories):
        points = found.found.points[index] if found.found.points else ()
        trajectories.append(
            TrajectoryRow(
                trajectory=_trajectory_id(question, found, index),
                question=question.id,
                prompt=question.text,
                is_right=one.is_right,
                ids=list(one.ids),
                texts=[_shown(tokenizer, token_id) for token_id in one.ids],
                log_probs=list(one.log_probs),
                points=[
                    PointRow(at.position, at.share.successes, at.share.trials, at.source)
                    for at in points
                ],
                pivots=[
                    PivotMark(pivot.candidate.position, pivot.effect)
                    for pivot in found.found.pivots
                    if pivot.candidate.trajectory == index
                ],
            )
        )
    return QuestionRows(
        dropped=found.dropped,
        pivots=[_pivot(question, found, one, model, tokenizer) for one in found.found.pivots],
        trajectories=trajectories,
        num_candidates=found.found.num_candidates,
        num_confirmed=found.found.num_confirmed,
        num_reused=found.found.num_reused,
        cost=found.cost,
    )


def read_pivots(path: Path) -> Iterator[PivotRow]:
    """Read the rows of a `pivots.jsonl`.

    Raises:
        DataError: the file cannot be read, or a line is not a pivot.
    """
    return _read(path, PivotRow, "pivot")


def read_trajectories(path: Path) -> Iterator[TrajectoryRow]:
    """Read the rows of a `trajectories.jsonl`.

    Raises:
        DataError: the file cannot be read, or a line is not a trajectory.
    """
    return _read(path, TrajectoryRow, "trajectory")


def _read(path: Path, kind: type[Row], name: str) -> Iterator[Row]:
    decoder: msgspec.json.Decoder[Any] = msgspec.json.Decoder(kind)
    try:
        with path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                try:
                    yield decoder.decode(line)
                except (msgspec.DecodeError, UnicodeDecodeError) as error:
                    raise DataError(
                        f"{path}:{number} is not a {name}: {error}; write it with `phi4 pts search`"
                    ) from None
    except OSError as error:
        raise DataError(
            f"{path} cannot be read: {error.strerror}; give a directory of `phi4 pts search`"
        ) from None


def _pivot(
    question: KeyedQuestion, found: QuestionFound, pivot: Pivot, model: str, tokenizer: Tokenizer
) -> PivotRow:
    index, position = pivot.candidate.trajectory, pivot.candidate.position
    trajectory = found.trajectories[index]
    token, raises, other = trajectory.ids[position], pivot.effect > 0, pivot.counterpart
    chosen, rejected = None, None
    if other is not None:
        chosen, rejected = (token, other.id) if raises else (other.id, token)
    return PivotRow(
        question=question.id,
        task=question.task,
        model=model,
        trajectory=_trajectory_id(question, found, index),
        prompt_ids=list(question.prompt),
        answer_ids=list(trajectory.ids),
        position=position,
        token=token,
        token_text=_shown(tokenizer, token),
        sign="raises" if raises else "lowers",
        q=trajectory.q(position),
        dp_at_confirmation=pivot.effect,
        e_value=pivot.e_value,
        with_token=_count(pivot.with_token),
        without_token=_count(pivot.without),
        counterpart=None
        if other is None
        else CounterpartRow(other.share.successes, other.share.trials, id=other.id),
        counterpart_text="" if other is None else _shown(tokenizer, other.id),
        no_pair_reason=pivot.no_pair_reason,
        chosen_id=chosen,
        rejected_id=rejected,
    )


def _trajectory_id(question: KeyedQuestion, found: QuestionFound, index: int) -> str:
    return f"{question.id}/{'right' if found.trajectories[index].is_right else 'wrong'}"


def _count(share: Share) -> CountRow:
    return CountRow(share.successes, share.trials)


def _shown(tokenizer: Tokenizer, token_id: int) -> str:
    return tokenizer.bytes_of(token_id).decode("utf-8", errors="backslashreplace")
