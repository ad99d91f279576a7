"""Test whether a token is pivotal, on fresh completions with and without it, with early stopping.

A candidate is confirmed by an e-process and a question's candidates by e-BH. Both are valid if each
test stops by its own data and if tests depend on each other, unlike a fixed number of samples per
estimate.
"""

import math
from collections.abc import Sequence

from phi4.oracles.verdict import Grade
from phi4.pts.search.rollouts import Rollout, Share
from phi4.pts.search.settings import SearchSettings

_PRIOR = 0.18
"""Pseudo-counts of both outcomes in the running means: most shares are near 0 or 1 late in an
answer."""

MIN_DRAWS = 16
"""Minimum per side before a test ends by itself; an estimate from fewer is too imprecise."""


class EProcess:
    """Evidence against equal success probabilities of two sides, from pairs of outcomes.

    Under equal probabilities the expectation of exp(log_e) never exceeds 1, at any stopping time:
    every factor is the ratio of a prediction for both sides separately to one for both together,
    made before the pair is observed.

    Attributes:
        log_e: log of the e-value.
    """

    def __init__(self) -> None:
        self.log_e = 0.0
        self._num = self._right_with = self._right_without = 0

    def add(self, is_right_with: bool, is_right_without: bool) -> None:
        """Add one outcome of each side."""
        total = self._num + 2 * _PRIOR
        with_token = (self._right_with + _PRIOR) / total
        without = (self._right_without + _PRIOR) / total
        both = (with_token + without) / 2
        self.log_e += math.log(
            (with_token if is_right_with else 1 - with_token)
            * (without if is_right_without else 1 - without)
            / (both if is_right_with else 1 - both)
            / (both if is_right_without else 1 - both)
        )
        self._num += 1
        self._right_with += is_right_with
        self._right_without += is_right_without


class Confirmation:
    """The test of one candidate.

    By total probability p(prefix) = q p(with) + (1 - q) p(without), so the token's effect on p is
    (1 - q) (p(with) - p(without)): its error is 1 - q times that of two plain estimates.

    Args:
        q: the token's probability in the sampler's distribution.
        num_candidates: number of the question's candidates.
        settings: level, sizes and gap.

    Attributes:
        is_open: whether it needs more completions.
        num_blocks: number of blocks so far, per side.
        without: completions without the token so far.
    """

    def __init__(self, q: float, num_candidates: int, settings: SearchSettings) -> None:
        self.is_open = settings.confirm_draws > 0
        self.num_blocks = 0
        self.without: list[Rollout] = []
        self._rest = 1 - q
        self._enough = math.log(num_candidates / settings.alpha)
        self._settings = settings
        self._process = EProcess()
        self._num = 0
        self._graded: tuple[list[bool], list[bool]] = ([], [])

    def add(self, with_token: Sequence[Rollout], without: Sequence[Rollout]) -> None:
        """Add a block of either side; decide whether to continue."""
        self.num_blocks += 1
        self.without += without
        for side, rollouts in zip(self._graded, (with_token, without), strict=True):
            gradable = (one for one in rollouts if one.grade is not Grade.UNGRADABLE)
            side += [one.grade is Grade.RIGHT for one in gradable]
        # An outcome whose partner cannot be graded waits for the next block.
        while self._num < min(map(len, self._graded)):
            self._process.add(self._graded[0][self._num], self._graded[1][self._num])
            self._num += 1
        is_used_up = self.num_blocks * self._settings.block_draws >= self._settings.confirm_draws
        self.is_open = not (is_used_up or self._is_decided())

    @property
    def log_e(self) -> float:
        """Log of the e-value."""
        return self._process.log_e

    @property
    def shares(self) -> tuple[Share, Share]:
        """Return the success rates with and without the token, for the outcomes that were
        compared."""
        with_token, without = (Share(sum(side[: self._num]), self._num) for side in self._graded)
        return with_token, without

    @property
    def effect(self) -> float:
        """Estimate of the token's change of p; biased away from 0, because the test stops at
        extremes.

        0 while nothing was compared.
        """
        with_token, without = self.shares
        return self._rest * (with_token.value - without.value) if self._num else 0.0

    def _is_decided(self) -> bool:
        variances = [_variance(share) for share in self.shares]
        error, effect = self._rest * math.sqrt(sum(variances)), abs(self.effect)
        gap = self._settings.min_effect
        if self._num < MIN_DRAWS:
            return False
        is_confirmed = self.log_e >= self._enough and effect - error > gap
        is_too_small = effect + 2 * error < gap
        # After half of the budget, evidence for no effect is rarely reversed by the other half.
        is_hopeless = self.log_e < 0 and self._num >= self._settings.confirm_draws / 2
        return is_confirmed or is_too_small or is_hopeless


def confirmed(log_e: Sequence[float], alpha: float) -> list[int]:
    """Apply e-BH: return indices of the e-values that pass at a level, ascending.

    The expected share of true null hypotheses among them is at most alpha, however the e-values
    depend on each other. Source: Wang and Ramdas 2022, False discovery rate control with e-values.
    """
    ordered = sorted(range(len(log_e)), key=lambda index: -log_e[index])
    num_kept = 0
    for rank, index in enumerate(ordered, start=1):
        if log_e[index] >= math.log(len(log_e) / (alpha * rank)):
            num_kept = rank
    return sorted(ordered[:num_kept])


def _variance(share: Share) -> float:
    """Return the variance of a proportion, never 0: half a success and half a failure are added."""
    right, wrong = share.successes + 0.5, share.trials - share.successes + 0.5
    return right * wrong / (share.trials + 1) ** 3
