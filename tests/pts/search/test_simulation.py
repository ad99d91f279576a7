"""The search where the truth is known: errors, recall and cost, and a mutant that breaks them."""

from dataclasses import replace

import numpy as np
import pytest

from phi4.pts.search.rollouts import Purpose, Rollout, RolloutBlock, Start, share_of
from tools.pts_simulation import (
    MAX_FLAT_ANSWERS,
    OURS,
    PAGE,
    REPORT,
    TOKEN_MIDDLE,
    draw_answers,
    draw_flat_answers,
    faults,
    measure,
    newest_rows,
    page_with,
)
from tools.pts_worlds import REGIMES, KnownAnswer, KnownWorld, draw_answer

NUM_ANSWERS = 150
SEED = 5


@pytest.mark.parametrize("regime", REGIMES, ids=lambda regime: regime.name)
def test_bounds_hold_and_others_lie_below(regime) -> None:
    answers = draw_answers(regime, NUM_ANSWERS, SEED)
    ours = measure(OURS, answers, SEED)
    assert list(faults(regime.name, ours)) == []
    report = measure(REPORT, answers[:60], SEED)
    assert report.recall < ours.recall
    assert measure(TOKEN_MIDDLE, answers[:60], SEED).false > 0.1 > ours.false


def test_questions_without_a_pivot_seldom_yield_one() -> None:
    found = measure(OURS, draw_flat_answers(NUM_ANSWERS, SEED), SEED)
    assert found.answers_with_pivots <= MAX_FLAT_ANSWERS


def test_page_says_what_the_rows_say() -> None:
    assert page_with(newest_rows()) == PAGE.read_text(encoding="utf-8"), (
        "run: python -m tools.pts_simulation --docs"
    )


class ReusingWorld(KnownWorld):
    """Confirms a token with the completions that made it a candidate, again and again."""

    def __init__(self, answer: KnownAnswer, rng: np.random.Generator) -> None:
        super().__init__(answer, rng)
        self._of_tree: dict[int, list[Rollout]] = {}

    def rollouts(self, block: RolloutBlock) -> list[Rollout]:
        position = len(block.start.prefix)
        if block.purpose is Purpose.TREE:
            self._of_tree[position] = super().rollouts(block)
            return self._of_tree[position]
        known = self._of_tree.get(position + (block.start.forced is not None), [])
        if len(known) < block.n:
            return super().rollouts(block)
        begin = block.number * block.n
        return [known[(begin + i) % len(known)] for i in range(block.n)]


def test_confirming_with_the_trees_completions_breaks_the_bound() -> None:
    found = measure(OURS, draw_flat_answers(NUM_ANSWERS, SEED), SEED, ReusingWorld)
    assert found.answers_with_pivots > 1.5 * MAX_FLAT_ANSWERS


@pytest.mark.parametrize("regime", REGIMES, ids=lambda regime: regime.name)
def test_world_keeps_the_law_of_total_probability(regime) -> None:
    """What the worlds draw has the p that they say, with the token, without it, and at all."""
    rng = np.random.default_rng(SEED)
    answer = draw_answer(rng, 30, regime)
    assert (np.abs(answer.effects) <= 1 - answer.q + 1e-9).all()
    world = KnownWorld(answer, rng)
    position = int(np.argmax(np.abs(answer.effects[:-1])))
    ids = answer.trajectory.ids

    def share(**fields: object) -> float:
        start = Start(ids[:position], **fields)
        block = RolloutBlock(Purpose.TREE, start, 0, 4000)
        return share_of(world.rollouts(replace(block, along=ids[position:]))).value

    q, token = answer.q[position], ids[position]
    with_token, without = share(forced=token), share(forbidden=token)
    assert with_token == pytest.approx(answer.p[position + 1], abs=0.05)
    assert share() == pytest.approx(answer.p[position], abs=0.05)
    assert q * with_token + (1 - q) * without == pytest.approx(answer.p[position], abs=0.05)
