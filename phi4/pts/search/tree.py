"""Find candidates: measure p at the ends of a piece, and if they differ, at its middle.

Pieces of all trajectories of a question are opened level by level, so that a level is one batch,
and a prefix that trajectories share is measured once.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from phi4.pts.search.rollouts import Asks, Purpose, Rollout, RolloutBlock, Share, Start, share_of
from phi4.pts.search.segments import cuts, joint_probability, midpoint
from phi4.pts.search.settings import SearchSettings


@dataclass(frozen=True)
class Trajectory:
    """A finished answer whose tokens are searched.

    Attributes:
        ids: ids of the answer, including its end token.
        log_probs: log probs of `ids` in the sampler's distribution.
        is_right: the oracle's verdict, which is p of the complete answer.
    """

    ids: tuple[int, ...]
    log_probs: tuple[float, ...]
    is_right: bool

    def q(self, position: int) -> float:
        """Return the sampler's probability of a token."""
        return math.exp(self.log_probs[position])


@dataclass(frozen=True)
class CandidateToken:
    """A token that may be pivotal, at its first position in a question.

    Attributes:
        trajectory: index among the question's.
        position: position of the token in it.
    """

    trajectory: int
    position: int


@dataclass(frozen=True)
class _Segment:
    trajectory: int
    begin: int
    end: int


class MeasuredPrefixes:
    """p of prefixes of trajectories, as measured by the tree.

    Attributes:
        drawn: completions that began at a prefix.
        shares: results of those, and of others that passed through it.
        num_reused: completions that were not sampled because others passed through a prefix.
    """

    def __init__(self, trajectories: Sequence[Trajectory], settings: SearchSettings) -> None:
        self.drawn: dict[tuple[int, ...], Sequence[Rollout]] = {}
        self.shares = {one.ids: Share(int(one.is_right), 1) for one in trajectories}
        self.num_reused = 0
        self._answers: dict[tuple[int, ...], tuple[int, ...]] = {}
        self._trajectories = trajectories
        self._settings = settings

    def measure(self, ends: Iterable[tuple[int, int]]) -> Asks[None]:
        """Measure new prefixes, and update the counts of measured ones.

        Args:
            ends: trajectory and length of each prefix.
        """
        answers = {
            self._trajectories[index].ids[:length]: self._trajectories[index].ids
            for index, length in ends
            if length < len(self._trajectories[index].ids)
        }
        blocks = []
        for prefix, ids in answers.items():
            if prefix not in self._answers:
                self._answers[prefix] = ids
                num_passed = min(len(self._passed(prefix)), self._settings.node_rollouts)
                self.num_reused += num_passed
                lacking = self._settings.node_rollouts - num_passed
                start, along = Start(prefix), ids[len(prefix) :]
                blocks.append(RolloutBlock(Purpose.TREE, start, 0, lacking, along))
        blocks = [block for block in blocks if block.n > 0]
        drawn = (yield blocks) if blocks else []
        for block, rollouts in zip(blocks, drawn, strict=True):
            self.drawn[block.start.prefix] = rollouts
        for prefix in answers:
            through = [*self._passed(prefix), *self.drawn.get(prefix, ())]
            self.shares[prefix] = share_of(through)

    def _passed(self, prefix: tuple[int, ...]) -> list[Rollout]:
        """Return completions of shorter prefixes that passed through this one."""
        if not self._settings.reuses_rollouts:
            return []
        return [
            one
            for shorter, rollouts in self.drawn.items()
            if len(shorter) < len(prefix) and self._answers[shorter][: len(prefix)] == prefix
            for one in rollouts
            if one.num_followed >= len(prefix) - len(shorter)
        ]


def find_candidates(
    trajectories: Sequence[Trajectory], settings: SearchSettings, measured: MeasuredPrefixes
) -> Asks[list[CandidateToken]]:
    """Find the candidates of a question's trajectories, each pair of prefix and token once.

    Args:
        trajectories: trajectories of one question.
        settings: settings of the search.
        measured: receives the measurements.
    """
    if settings.has_tree:
        found = yield from _grow(trajectories, settings, measured)
    else:
        found = [
            CandidateToken(index, position)
            for index, one in enumerate(trajectories)
            for position in range(len(one.ids))
            if one.q(position) <= settings.max_token_probability
        ]
    first: dict[tuple[int, ...], CandidateToken] = {}
    for one in sorted(found, key=lambda one: (one.trajectory, one.position)):
        first.setdefault(trajectories[one.trajectory].ids[: one.position + 1], one)
    return list(first.values())


def _grow(
    trajectories: Sequence[Trajectory], settings: SearchSettings, measured: MeasuredPrefixes
) -> Asks[list[CandidateToken]]:
    candidates: list[CandidateToken] = []
    pieces = [
        _Segment(index, begin, end)
        for index, one in enumerate(trajectories)
        for begin, end in pairwise(cuts(one.log_probs, settings.num_cuts))
    ]
    while True:
        pieces = [one for one in pieces if _can_move(one, trajectories, settings)]
        if not pieces:
            return candidates
        ends = [(one.trajectory, end) for one in pieces for end in (one.begin, one.end)]
        yield from measured.measure(ends)
        opened = [one for one in pieces if _gap(one, trajectories, measured) >= settings.open_gap]
        candidates += [
            CandidateToken(one.trajectory, one.begin) for one in opened if one.end - one.begin == 1
        ]
        pieces = [half for one in opened for half in _halves(one, trajectories)]


def _can_move(
    piece: _Segment, trajectories: Sequence[Trajectory], settings: SearchSettings
) -> bool:
    log_probs = trajectories[piece.trajectory].log_probs
    joint = joint_probability(log_probs, piece.begin, piece.end)
    return joint <= settings.max_token_probability


def _gap(piece: _Segment, trajectories: Sequence[Trajectory], measured: MeasuredPrefixes) -> float:
    ids = trajectories[piece.trajectory].ids
    before, after = (measured.shares[ids[:end]].value for end in (piece.begin, piece.end))
    return abs(after - before)


def _halves(piece: _Segment, trajectories: Sequence[Trajectory]) -> list[_Segment]:
    if piece.end - piece.begin == 1:
        return []
    middle = midpoint(trajectories[piece.trajectory].log_probs, piece.begin, piece.end)
    return [
        _Segment(piece.trajectory, piece.begin, middle),
        _Segment(piece.trajectory, middle, piece.end),
    ]
