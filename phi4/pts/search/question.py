"""Search one question, from its first answers to its pivots.

Every question ends in a result: searched, or dropped with a reason, so that the counts of a report
add up.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from phi4.oracles.verdict import Grade
from phi4.pts.search.confirm import confirmed
from phi4.pts.search.pivots import Pivot, confirm_candidates, pivots_of_tests, pivots_of_tree
from phi4.pts.search.rollouts import Asks, Purpose, Rollout, RolloutBlock, Share, Start, share_of
from phi4.pts.search.settings import SearchSettings
from phi4.pts.search.tree import MeasuredPrefixes, Trajectory, find_candidates

T = TypeVar("T")

TOO_EASY = "too easy"
TOO_HARD = "too hard"
UNGRADABLE = "ungradable"
TOO_LONG = "too long for the model"


@dataclass(frozen=True)
class SearchCost:
    """Counts of completions of one or many questions.

    Attributes:
        completions: sampled completions.
        tokens: sampled tokens.
        truncated: completions that reached `max_tokens`; each is a failure.
        ungradable: completions that were neither right nor wrong.
    """

    completions: int = 0
    tokens: int = 0
    truncated: int = 0
    ungradable: int = 0

    def __add__(self, other: "SearchCost") -> "SearchCost":
        """Add two costs."""
        return SearchCost(
            self.completions + other.completions,
            self.tokens + other.tokens,
            self.truncated + other.truncated,
            self.ungradable + other.ungradable,
        )


def cost_of(rollouts: Sequence[Rollout]) -> SearchCost:
    """Return the cost of completions."""
    return SearchCost(
        len(rollouts),
        sum(one.num_tokens for one in rollouts),
        sum(one.is_truncated for one in rollouts),
        sum(one.grade is Grade.UNGRADABLE for one in rollouts),
    )


@dataclass(frozen=True)
class MeasuredPoint:
    """p at a position of a trajectory.

    Attributes:
        position: tokens before it.
        share: fraction of right completions that begin there.
        source: `tree`, `confirm` or `verdict`.
    """

    position: int
    share: Share
    source: str


@dataclass(frozen=True)
class TrajectoriesFound:
    """Results from a question's trajectories.

    Attributes:
        points: points of each trajectory, by position.
        num_candidates: number of tested tokens.
        num_confirmed: tokens that pass at the level, including those with effects too small to
            keep.
        num_reused: completions that did not have to be sampled; see `SearchSettings`.
        pivots: in the order of trajectory and position.
    """

    points: tuple[tuple[MeasuredPoint, ...], ...] = ()
    num_candidates: int = 0
    num_confirmed: int = 0
    num_reused: int = 0
    pivots: tuple[Pivot, ...] = ()


@dataclass(frozen=True)
class QuestionFound:
    """Result of a question.

    Attributes:
        dropped: why it was not completely searched; empty if it was.
        screen: right answers among the first ones.
        trajectories: searched trajectories.
        found: their results; empty if the question was dropped.
        cost: total cost.
    """

    dropped: str
    screen: Share
    trajectories: tuple[Trajectory, ...] = ()
    found: TrajectoriesFound = field(default_factory=TrajectoriesFound)
    cost: SearchCost = field(default_factory=SearchCost)


class TooManyUngradableError(Exception):
    """More of a question's completions than allowed were neither right nor wrong."""


def search_question(settings: SearchSettings) -> Asks[QuestionFound]:
    """Screen a question, choose its trajectories and search them."""
    [rollouts] = yield [
        RolloutBlock(Purpose.SCREEN, Start(()), 0, settings.screen_rollouts),
    ]
    screen, cost = share_of(rollouts), cost_of(rollouts)
    reason = _reason_to_drop(rollouts, screen, settings)
    if reason:
        return QuestionFound(reason, screen, cost=cost)
    trajectories = _trajectories(rollouts)
    spent = [cost]
    searching = _counted(search_trajectories(trajectories, settings), spent, settings)
    try:
        found = yield from searching
    except TooManyUngradableError:
        return QuestionFound(UNGRADABLE, screen, cost=spent[0])
    return QuestionFound("", screen, trajectories, found, spent[0])


def search_trajectories(
    trajectories: Sequence[Trajectory], settings: SearchSettings
) -> Asks[TrajectoriesFound]:
    """Search the trajectories of one question."""
    measured = MeasuredPrefixes(trajectories, settings)
    candidates = yield from find_candidates(trajectories, settings, measured)
    if settings.confirm_draws == 0:
        pivots = yield from pivots_of_tree(candidates, measured, trajectories, settings)
        points = _points(trajectories, measured, {})
        return TrajectoriesFound(points, len(candidates), len(candidates), 0, tuple(pivots))
    tests = yield from confirm_candidates(candidates, trajectories, settings)
    kept = confirmed([test.log_e for test in tests], settings.alpha)
    of_kept = [candidates[index] for index in kept], [tests[index] for index in kept]
    pivots = yield from pivots_of_tests(*of_kept, trajectories, settings)
    behind = {
        trajectories[one.trajectory].ids[: one.position + 1]: test.shares[0]
        for one, test in zip(candidates, tests, strict=True)
    }
    points = _points(trajectories, measured, behind)
    num_reused = measured.num_reused
    return TrajectoriesFound(points, len(candidates), len(kept), num_reused, tuple(pivots))


def _reason_to_drop(rollouts: Sequence[Rollout], screen: Share, settings: SearchSettings) -> str:
    num_ungradable = len(rollouts) - screen.trials
    if num_ungradable > settings.max_ungradable_share * len(rollouts):
        return UNGRADABLE
    if screen.value > settings.max_share:
        return TOO_EASY
    return TOO_HARD if screen.value < settings.min_share else ""


def _trajectories(rollouts: Sequence[Rollout]) -> tuple[Trajectory, ...]:
    """Return the first right and the first wrong answer; truncated answers are excluded."""
    finished = [one for one in rollouts if one.ids and not one.is_truncated]
    picked = [
        next((one for one in finished if one.grade is grade), None)
        for grade in (Grade.RIGHT, Grade.WRONG)
    ]
    return tuple(
        Trajectory(one.ids, one.log_probs, one.grade is Grade.RIGHT)
        for one in picked
        if one is not None
    )


def _counted(searching: Asks[T], spent: list[SearchCost], settings: SearchSettings) -> Asks[T]:
    """Return a search whose costs are added to `spent[0]`.

    Raises:
        TooManyUngradableError: see there.
    """
    try:
        blocks = next(searching)
        while True:
            drawn = yield blocks
            spent[0] += sum(map(cost_of, drawn), SearchCost())
            if spent[0].ungradable > settings.max_ungradable_share * spent[0].completions:
                raise TooManyUngradableError
            blocks = searching.send(drawn)
    except StopIteration as stop:
        return stop.value


def _points(
    trajectories: Sequence[Trajectory],
    measured: MeasuredPrefixes,
    behind: Mapping[tuple[int, ...], Share],
) -> tuple[tuple[MeasuredPoint, ...], ...]:
    """Return the measurements of p along each trajectory; a tree's shares before those of tests."""
    found = []
    for one in trajectories:
        points = []
        for position in range(len(one.ids)):
            prefix = one.ids[:position]
            if prefix in measured.shares:
                points.append(MeasuredPoint(position, measured.shares[prefix], "tree"))
            elif prefix in behind:
                points.append(MeasuredPoint(position, behind[prefix], "confirm"))
        points.append(MeasuredPoint(len(one.ids), measured.shares[one.ids], "verdict"))
        found.append(tuple(points))
    return tuple(found)
