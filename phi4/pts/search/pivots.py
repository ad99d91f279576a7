"""Convert candidates to pivots: confirm, measure with and without the token, find a counterpart.

A counterpart is a token that the sampler drew in the pivot's position, with measured completions
after it. A pivot without one is kept without a pair, with the reason.
"""

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from phi4.oracles.verdict import Grade
from phi4.pts.search.confirm import Confirmation
from phi4.pts.search.rollouts import (
    NO_TOKEN,
    Asks,
    Purpose,
    Rollout,
    RolloutBlock,
    Share,
    Start,
    share_of,
)
from phi4.pts.search.settings import SearchSettings
from phi4.pts.search.tree import CandidateToken, MeasuredPrefixes, Trajectory

_MAX_LOG = 300 * math.log(10)


@dataclass(frozen=True)
class TokenShare:
    """A token in a pivot's position, and the results of the completions after it."""

    id: int
    share: Share


@dataclass(frozen=True)
class Pivot:
    """A token that changed p.

    Attributes:
        candidate: the token and its position.
        effect: measured change of p; biased away from 0 by the stopping of the test.
        log_e: log of its e-value; None if nothing was confirmed.
        with_token: completions after the token.
        without: completions after other tokens in its position.
        counterpart: the other token of its pair; None without a pair.
        no_pair_reason: why there is none; empty with a pair.
    """

    candidate: CandidateToken
    effect: float
    log_e: float | None
    with_token: Share
    without: Share
    counterpart: TokenShare | None
    no_pair_reason: str

    @property
    def e_value(self) -> float | None:
        """The e-value of its test, at most 1e300."""
        return None if self.log_e is None else math.exp(min(self.log_e, _MAX_LOG))


@dataclass(frozen=True)
class _Tested:
    candidate: CandidateToken
    effect: float
    log_e: float | None
    with_token: Share
    others: Sequence[Rollout]


def confirm_candidates(
    candidates: Sequence[CandidateToken],
    trajectories: Sequence[Trajectory],
    settings: SearchSettings,
) -> Asks[list[Confirmation]]:
    """Test every candidate on fresh completions, all concurrently."""
    tests = [
        Confirmation(trajectories[one.trajectory].q(one.position), len(candidates), settings)
        for one in candidates
    ]
    while running := [index for index, test in enumerate(tests) if test.is_open]:
        blocks: list[RolloutBlock] = []
        for index in running:
            blocks += _sides(candidates[index], trajectories, tests[index].num_blocks, settings)
        drawn: Iterator[Sequence[Rollout]] = iter((yield blocks))
        for index in running:
            one = candidates[index]
            trajectory = trajectories[one.trajectory]
            with_token: Sequence[Rollout]
            if one.position + 1 == len(trajectory.ids):
                with_token = [_verdict(trajectory)] * settings.block_draws
            else:
                with_token = next(drawn)
            tests[index].add(with_token, next(drawn))
    return tests


def _sides(
    one: CandidateToken, trajectories: Sequence[Trajectory], number: int, settings: SearchSettings
) -> list[RolloutBlock]:
    """Return the starts with the token and without it; nothing is sampled after a final token."""
    ids = trajectories[one.trajectory].ids
    prefix, token = ids[: one.position], ids[one.position]
    starts = [Start(prefix, forced=token), Start(prefix, forbidden=token)]
    if one.position + 1 == len(ids):
        del starts[0]
    return [RolloutBlock(Purpose.CONFIRM, start, number, settings.block_draws) for start in starts]


def _verdict(trajectory: Trajectory) -> Rollout:
    grade = Grade.RIGHT if trajectory.is_right else Grade.WRONG
    return Rollout(grade, trajectory.ids[-1], 0)


def pivots_of_tests(
    candidates: Sequence[CandidateToken],
    tests: Sequence[Confirmation],
    trajectories: Sequence[Trajectory],
    settings: SearchSettings,
) -> Asks[list[Pivot]]:
    """Return the confirmed candidates whose effect is large enough, with counterparts.

    Args:
        candidates: candidates that e-BH confirmed.
        tests: test of each.
        trajectories: trajectories of the question.
        settings: settings of the search.
    """
    kept = [
        _Tested(one, test.effect, test.log_e, _share_behind(one, test, trajectories), test.without)
        for one, test in zip(candidates, tests, strict=True)
        if abs(test.effect) >= settings.min_effect
    ]
    return (yield from _with_counterparts(kept, trajectories, settings))


def _share_behind(
    one: CandidateToken, test: Confirmation, trajectories: Sequence[Trajectory]
) -> Share:
    """Return the share of completions with the token; for a final token, the verdict counts."""
    trajectory = trajectories[one.trajectory]
    if one.position + 1 == len(trajectory.ids):
        return Share(int(trajectory.is_right), 1)
    return test.shares[0]


def pivots_of_tree(
    candidates: Sequence[CandidateToken],
    measured: MeasuredPrefixes,
    trajectories: Sequence[Trajectory],
    settings: SearchSettings,
) -> Asks[list[Pivot]]:
    """Return every candidate as a pivot, with the tree's measurements."""
    kept = []
    for one in candidates:
        ids = trajectories[one.trajectory].ids
        prefix, behind = ids[: one.position], ids[: one.position + 1]
        with_token = measured.shares[behind]
        effect = with_token.value - measured.shares[prefix].value
        others = [drawn for drawn in measured.drawn[prefix] if drawn.first != ids[one.position]]
        kept.append(_Tested(one, effect, None, with_token, others))
    return (yield from _with_counterparts(kept, trajectories, settings))


def _with_counterparts(
    tested: Sequence[_Tested], trajectories: Sequence[Trajectory], settings: SearchSettings
) -> Asks[list[Pivot]]:
    """Find counterparts; sample more completions after the likeliest other tokens if there are too
    few."""
    by_token = [_by_first(one.others) for one in tested]
    lacking: dict[Start, int] = {}
    owners: dict[Start, list[int]] = defaultdict(list)
    for index, (one, drawn) in enumerate(zip(tested, by_token, strict=True)):
        shares = {token: share_of(rollouts) for token, rollouts in drawn.items()}
        if any(share.trials >= settings.counterpart_trials for share in shares.values()):
            continue
        likeliest = sorted(drawn, key=lambda token: (-len(drawn[token]), token))
        prefix = trajectories[one.candidate.trajectory].ids[: one.candidate.position]
        for token in likeliest[: settings.counterpart_tokens]:
            # Pivots of two trajectories in one position share the completions after a third token.
            start = Start(prefix, forced=token)
            num_lacking = settings.counterpart_trials - shares[token].trials
            lacking[start] = max(num_lacking, lacking.get(start, 0))
            owners[start].append(index)
    blocks = [RolloutBlock(Purpose.COUNTERPART, start, 0, n) for start, n in lacking.items()]
    drawn_after = (yield blocks) if blocks else []
    for start, rollouts in zip(lacking, drawn_after, strict=True):
        assert start.forced is not None
        for index in owners[start]:
            by_token[index][start.forced] += rollouts
    return [_pivot(one, drawn, settings) for one, drawn in zip(tested, by_token, strict=True)]


def _by_first(rollouts: Sequence[Rollout]) -> dict[int, list[Rollout]]:
    grouped: dict[int, list[Rollout]] = defaultdict(list)
    for one in rollouts:
        if one.first != NO_TOKEN:
            grouped[one.first].append(one)
    return dict(grouped)


def _pivot(one: _Tested, drawn: dict[int, list[Rollout]], settings: SearchSettings) -> Pivot:
    counterpart, reason = _counterpart(one, drawn, settings)
    return Pivot(
        candidate=one.candidate,
        effect=one.effect,
        log_e=one.log_e,
        with_token=one.with_token,
        without=share_of(one.others),
        counterpart=counterpart,
        no_pair_reason=reason,
    )


def _counterpart(
    one: _Tested, drawn: dict[int, list[Rollout]], settings: SearchSettings
) -> tuple[TokenShare | None, str]:
    """Return the token whose share is the furthest on the other side, or why there is none."""
    raises = one.effect > 0
    shares = [TokenShare(token, share_of(rollouts)) for token, rollouts in drawn.items()]
    least = settings.counterpart_trials
    known = [token for token in shares if token.share.trials >= least]
    if not known:
        return None, f"no other token has {least} graded completions"
    sign = 1 if raises else -1
    found = min(known, key=lambda token: (sign * token.share.value, token.id))
    if sign * found.share.value >= sign * one.with_token.value:
        return None, "no other token with enough completions is on the other side"
    return found, ""
