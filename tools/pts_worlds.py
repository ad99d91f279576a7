"""Answers with a known p at every token, as worlds that a search can be run on.

A world answers the blocks of `phi4.pts.search` and nothing else, so the search that
is measured is the one that users run, and only the sampler and the oracle are replaced.
"""

from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from phi4.oracles.verdict import Grade
from phi4.pts.search.rollouts import Asks, Rollout, RolloutBlock
from phi4.pts.search.tree import Trajectory

T = TypeVar("T")

FIRST_ALTERNATIVE = 1_000_000
"""Id of the one other token at position 0; the next position has the next id."""


@dataclass(frozen=True)
class Regime:
    """How p changes along an answer.

    Attributes:
        name: name of the regime.
        num_branches: expected tokens with a large effect.
        take_back: chance that such an effect is undone 3 to 14 tokens later.
        drift: scale of the small effects of tokens that the sampler is unsure of.
    """

    name: str
    num_branches: float
    take_back: float
    drift: float


REGIMES = (
    Regime("sparse", 4, 0.0, 0.0),
    Regime("diffuse", 2, 0.0, 0.1),
    Regime("non-monotone", 7, 0.8, 0.02),
)


@dataclass(frozen=True)
class KnownAnswer:
    """An answer with ids 0, 1, 2 and so on.

    Attributes:
        p: [n + 1], chance of success behind each prefix; 0 or 1 behind the last token.
        q: [n], the sampler's probability of each token.
        is_coin: whether the oracle tosses a coin of chance `p[0]` for every completion, so that no
            token has an effect, whatever `p` is behind the last one.
    """

    p: np.ndarray
    q: np.ndarray
    is_coin: bool = False

    @property
    def effects(self) -> np.ndarray:
        """[n], true change of p by each token."""
        return np.zeros(len(self.q)) if self.is_coin else np.diff(self.p)

    @property
    def trajectory(self) -> Trajectory:
        """As a search is given it."""
        return Trajectory(
            ids=tuple(range(len(self.q))),
            log_probs=tuple(map(float, np.log(self.q))),
            is_right=bool(self.p[-1]),
        )


class KnownWorld:
    """Draws completions of an answer.

    Attributes:
        completions: drawn so far.
        tokens: that they have.
    """

    def __init__(self, answer: KnownAnswer, rng: np.random.Generator) -> None:
        self.completions = self.tokens = 0
        self._answer = answer
        self._surprise = np.concatenate([[0.0], np.cumsum(-np.log(answer.q))])
        # Of those that leave the answer at a position; the last one never does.
        others = [self._other(position) for position in range(len(answer.q))]
        behind_all = answer.p[0] if answer.is_coin else answer.p[-1]
        self._chances = np.array([*others, behind_all])
        self._rng = rng

    def rollouts(self, block: RolloutBlock) -> list[Rollout]:
        """Return what a block draws."""
        position = len(block.start.prefix)
        length = len(self._answer.q) - position
        self.completions += block.n
        self.tokens += block.n * length
        followed = self._followed(block, position)
        is_right = self._rng.random(block.n) < self._chances[position + followed]
        return [
            Rollout(
                Grade.RIGHT if right else Grade.WRONG,
                position if num else FIRST_ALTERNATIVE + position,
                length,
                num,
            )
            for right, num in zip(is_right.tolist(), followed.tolist(), strict=True)
        ]

    def _followed(self, block: RolloutBlock, position: int) -> np.ndarray:
        """How many tokens of the answer each completion begins with."""
        if block.start.forbidden is not None:
            return np.zeros(block.n, int)
        begin = position + (block.start.forced is not None)
        aims = self._surprise[begin] + self._rng.exponential(size=block.n)
        last = np.searchsorted(self._surprise, aims, side="right") - 1
        return np.maximum(last, begin) - position

    def _other(self, position: int) -> float:
        """p behind the other tokens, by total probability."""
        p, q = self._answer.p, self._answer.q[position]
        if self._answer.is_coin:
            return p[0]
        return min(max((p[position] - q * p[position + 1]) / (1 - q), 0.0), 1.0)


def run_in(world: KnownWorld, asks: Asks[T]) -> T:
    """Run a search to its end."""
    try:
        blocks = next(asks)
        while True:
            blocks = asks.send([world.rollouts(block) for block in blocks])
    except StopIteration as stop:
        return stop.value


def draw_answer(rng: np.random.Generator, length: int, regime: Regime) -> KnownAnswer:
    """Return an answer of a regime.

    p is a martingale under the sampler: at every token the mean over its alternatives is p before
    it. So no token moves p by more than its alternatives' probability, 1 - q.
    """
    while True:
        walk = _Walk(rng, length, regime)
        for position in range(length):
            walk.step(position)
        if walk.end():
            return walk.answer()


def flat_answer(rng: np.random.Generator, length: int) -> KnownAnswer:
    """Return an answer whose tokens have no effect, for success is a coin of the oracle.

    The sampler is sure of no token but the last one, so that every other one may be a candidate:
    the verdict is known behind the last one, which would be no test.
    """
    p = np.full(length + 1, rng.uniform(0.25, 0.75))
    q = rng.uniform(0.05, 0.35, length)
    p[-1], q[-1] = float(rng.random() < p[0]), 0.999
    return KnownAnswer(p, q, is_coin=True)


class _Walk:
    """p and q of an answer, token by token."""

    def __init__(self, rng: np.random.Generator, length: int, regime: Regime) -> None:
        is_sure = rng.random(length) < 0.72
        sure, unsure = 1 - rng.beta(1.2, 60, length), rng.uniform(0.1, 0.9, length)
        self._q = np.where(is_sure, sure, unsure)
        self._p = np.empty(length + 1)
        self._p[0] = rng.uniform(0.25, 0.75)
        self._rng, self._length, self._regime = rng, length, regime
        self._return: tuple[int, float] | None = None

    def step(self, position: int) -> None:
        """p behind one more token."""
        now, rng, regime = self._p[position], self._rng, self._regime
        following = now
        is_open = 0.02 < now < 0.98
        if self._return is not None and position == self._return[0] and is_open:
            following = self._take_back(position, now, self._return[1])
            self._return = None
        elif rng.random() < regime.num_branches / self._length and is_open:
            following = self._branch(position, now, rng.uniform(0.25, 1.0), (0.15, 0.85))
            if regime.take_back and rng.random() < regime.take_back:
                due = min(self._length - 1, position + 1 + int(rng.integers(3, 15)))
                self._return = (due, now)
        elif regime.drift and self._q[position] < 0.9:
            following = self._drift(position, now, abs(rng.normal() * regime.drift))
        self._p[position + 1] = min(max(following, 0.0), 1.0)

    def end(self) -> bool:
        """Make the answer right or wrong; False where that breaks the law of total probability."""
        p, q, rng = self._p, self._q, self._rng
        last = p[-1]
        if last < 0.03 or last > 0.97:
            p[-1] = round(last)
            return True
        # The last token decides.
        is_right = rng.random() < last
        q[-1] = min(q[-1], last if is_right else 1 - last)
        p[-2], p[-1] = last, float(is_right)
        return bool(abs(p[-2] - p[-3]) <= 1 - q[-2] + 1e-9)

    def answer(self) -> KnownAnswer:
        """With q no larger than the effects allow."""
        effects = np.abs(np.diff(self._p))
        q = np.where(effects > 1 - self._q, 1 - effects - 1e-6, self._q)
        return KnownAnswer(self._p, q.clip(1e-4, 1 - 1e-6))

    def _branch(
        self, position: int, now: float, spread: float, chances: tuple[float, float]
    ) -> float:
        """Two branches `spread` apart; the answer takes one of them by its chance."""
        chance = self._rng.uniform(*chances)
        spread = min(spread, (1 - now) / (1 - chance), now / chance)
        takes = self._rng.random() < chance
        # Several tokens may share a branch.
        own = chance if takes else 1 - chance
        self._q[position] = own * self._rng.uniform(0.5, 1)
        return now + (1 - chance) * spread if takes else now - chance * spread

    def _take_back(self, position: int, now: float, before: float) -> float:
        """Towards the p of before a branch, where the other outcome is possible too."""
        chance = self._rng.uniform(0.35, 0.8)
        other = (now - chance * before) / (1 - chance)
        if not 0 <= other <= 1:
            return now
        takes = self._rng.random() < chance
        own = chance if takes else 1 - chance
        self._q[position] = own * self._rng.uniform(0.5, 1)
        return before if takes else other

    def _drift(self, position: int, now: float, size: float) -> float:
        chance = self._rng.uniform(0.3, 0.7)
        spread = min(size / min(chance, 1 - chance), (1 - now) / (1 - chance), now / chance)
        takes = self._rng.random() < chance
        self._q[position] = min(self._q[position], chance)
        return now + (1 - chance) * spread if takes else now - chance * spread
