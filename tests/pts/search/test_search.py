"""The whole search on a model with planted pivots: what is found, asked, stored and written."""

import json
import sqlite3
import struct
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from phi4.errors import ConfigError, SamplerError
from phi4.pts.search.command import Search, search_and_write
from phi4.pts.search.rows import PivotRow, TrajectoryRow, read_pivots, read_trajectories
from phi4.pts.search.settings import SearchMode, settings_of
from phi4.pts.search.store import FILE_NAME
from phi4.sampling.questions import KeyedQuestion
from tests.pts.search.planted import (
    BAD,
    BEHIND_FORK,
    DOWN,
    FAIR,
    FORK,
    GOOD,
    LAST,
    NUM_TOKENS,
    OPTIONS,
    PROMPT_TOKENS,
    RIGHT,
    TURN,
    UP,
    WRONG,
    LastLetterOracle,
    PlantedScript,
    RecordingSampler,
    chances,
    questions,
    true_effects,
)

FILES = ("pivots.jsonl", "trajectories.jsonl")


def job(directory: Path, num: int = 3, **changes: object) -> Search:
    fields = {
        "questions": questions(num),
        "settings": settings_of(SearchMode.DEFAULT, seed=3),
        "options": OPTIONS,
        "model": "planted",
        "oracle": "last letter",
        "directory": directory,
    }
    return Search(**fields | changes)


def searched(
    search: Search, tokenizer, sampler: RecordingSampler | None = None
) -> tuple[list[PivotRow], list[TrajectoryRow], RecordingSampler, LastLetterOracle]:
    sampler, oracle = sampler or RecordingSampler(tokenizer), LastLetterOracle()
    search_and_write(search, sampler, tokenizer, oracle)
    pivots = list(read_pivots(search.directory / FILES[0]))
    return pivots, list(read_trajectories(search.directory / FILES[1])), sampler, oracle


@pytest.fixture(scope="module")
def default(tokenizer, tmp_path_factory):
    """Four questions, searched once."""
    directory = tmp_path_factory.mktemp("default")
    return *searched(job(directory, 4), tokenizer), directory


def test_planted_pivots_are_all_there_once_and_nothing_else(default) -> None:
    pivots, trajectories, *_ = default
    assert len(trajectories) == 8
    assert {one.is_right for one in trajectories} == {True, False}
    expected = Counter(
        (one.question, tuple(one.ids[: position + 1]), effect > 0)
        for one in trajectories
        for position, effect in true_effects(one.ids[:-1])
        if abs(effect) >= 0.3
    )
    found = [
        (one.question, (*one.answer_ids[: one.position], one.token), one.sign == "raises")
        for one in pivots
    ]
    assert len(found) == len(set(found))
    # Two trajectories may begin with the same pivot, which is found once.
    assert set(found) >= set(expected)
    assert {"raises", "lowers"} == {one.sign for one in pivots}
    for one in pivots:
        effects = dict(true_effects(one.answer_ids[:-1]))
        assert abs(effects[one.position]) >= 0.1
        assert effects[one.position] * one.dp_at_confirmation > 0
        assert abs(one.dp_at_confirmation) >= 0.2
        assert one.e_value > 10 and one.token == one.answer_ids[one.position]


def shares_without(directory: Path, pivot: PivotRow) -> Iterator[tuple[int, int, int]]:
    """Other tokens in a pivot's place, with successes and trials, from the stored completions."""
    packed = [struct.pack(f"<{len(ids)}I", *ids) for ids in (pivot.prompt_ids, prefix_of(pivot))]
    with closing(sqlite3.connect(directory / FILE_NAME)) as store:
        stored = store.execute(
            "SELECT rollouts FROM blocks JOIN nodes ON node = id WHERE prompt=? AND prefix=? AND "
            "(purpose='confirm' AND forbidden=? OR purpose='counterpart')",
            (*packed, pivot.token),
        ).fetchall()
    rollouts = [one for (row,) in stored for one in msgspec.msgpack.decode(row)]
    for token in sorted({one[1] for one in rollouts}):
        grades = [one[0] for one in rollouts if one[1] == token]
        yield token, grades.count("right"), len(grades)


def prefix_of(pivot: PivotRow) -> list[int]:
    return pivot.answer_ids[: pivot.position]


def test_counterpart_is_the_extreme_token_of_the_other_side(default) -> None:
    pivots, *_, directory = default
    other = {GOOD: BAD, BAD: GOOD, UP: DOWN, DOWN: UP, RIGHT: WRONG, WRONG: RIGHT}
    extreme = [one for one in pivots if one.counterpart and one.counterpart.id == other[one.token]]
    assert {one.token for one in extreme} >= {GOOD, BAD, UP, RIGHT, WRONG}
    paired = [one for one in pivots if one.counterpart is not None]
    assert {one.position for one in paired} == {FORK, TURN, LAST}
    for one in paired:
        shares = {
            token: successes / trials
            for token, successes, trials in shares_without(directory, one)
            if trials >= 8
        }
        sign = 1 if one.sign == "raises" else -1
        assert one.counterpart.id == min(shares, key=lambda token: sign * shares[token])
        assert one.counterpart.successes / one.counterpart.trials == shares[one.counterpart.id]
        assert one.counterpart.trials >= 8 and not one.no_pair_reason
        better, worse = one.token, one.counterpart.id
        if one.sign == "lowers":
            better, worse = worse, better
        assert (one.chosen_id, one.rejected_id) == (better, worse)


def test_rows_hold_what_was_measured(default) -> None:
    pivots, trajectories, *_ = default
    by_id = {one.trajectory: one for one in trajectories}
    for one in pivots:
        row = by_id[one.trajectory]
        assert (one.answer_ids, one.question) == (row.ids, row.question)
        assert (one.task, one.model) == ("letters", "planted")
        assert one.position in [mark.position for mark in row.pivots]
        if one.position == FORK:
            assert one.q == pytest.approx(BEHIND_FORK[one.token][0])
        if one.position < LAST:
            assert one.with_token.trials == one.without_token.trials >= 16
    for row in trajectories:
        assert len(row.ids) == len(row.log_probs) == len(row.texts) == NUM_TOKENS
        assert row.points[-1].source == "verdict"
        assert row.points[-1].successes == row.is_right
        assert row.points[0].position == 0 and row.points[0].trials >= 32
        assert all(text.startswith("\\x") for text in row.texts[:2])


def test_prefixes_are_the_drawn_ids_even_inside_a_character(default, tokenizer) -> None:
    _, trajectories, sampler, *_ = default
    known = {
        (*map(int, (ord("Q"), ord(row.question[1]))), *row.ids[:length])
        for row in trajectories
        for length in range(NUM_TOKENS)
    }
    prefixes = {request.prompt for request in sampler.requests}
    assert prefixes <= known
    # Between S and T, which a tokenizer would join, and inside the first character.
    assert any(prefix[-1] == ord("S") for prefix in prefixes)
    assert len(tokenizer.encode("ST")) == 1
    assert any(prefix[-1] in (0xC3, 0xC4) for prefix in prefixes)
    for request in sampler.requests:
        assert request.max_tokens == OPTIONS.max_tokens - (len(request.prompt) - PROMPT_TOKENS)


def test_search_asks_for_what_it_needs_and_in_batches(default) -> None:
    _, _, sampler, oracle, directory = default
    screens = [one for one in sampler.requests if one.log_probs]
    assert [one.n for one in screens] == [16] * 4
    forced = [one for one in sampler.requests if one.forced]
    forbidden = [one for one in sampler.requests if one.forbidden_first]
    assert {one.n for one in forced + forbidden} == {8}
    # At the last but one token, both sides; at the last, the verdict is known.
    assert all(len(one.prompt) - PROMPT_TOKENS < NUM_TOKENS - 1 for one in forced)
    assert len({one.seed for one in sampler.requests}) == len(sampler.requests)
    assert max(oracle.batches) > 32
    report = json.loads((directory / "report.json").read_text())
    assert report["completions"] == sum(one.n for one in sampler.requests)
    assert report["completions"] == len(sampler.completions)
    drawn = sum(len(one.tokens) for one in sampler.completions)
    assert report["tokens"] == drawn - sum(one.n * len(one.forced) for one in sampler.requests)
    assert (report["questions"], report["kept"], report["dropped"]) == (4, 4, {})
    assert report["per_pivot"]["completions"] > 0


def test_questions_together_and_alone_give_the_same_rows(default, tokenizer, tmp_path) -> None:
    pivots, *_ = default
    alone = []
    for one in reversed(questions(4)):
        search = job(tmp_path / one.id, questions=(one,))
        alone += searched(search, tokenizer)[0]
    assert sorted(map(repr, alone)) == sorted(map(repr, pivots))


def test_few_questions_and_requests_at_once_change_nothing(
    default, tokenizer, tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr("phi4.pts.search.run.MAX_QUESTIONS", 1)
    monkeypatch.setattr("phi4.pts.search.run.MAX_OPEN", 3)
    pivots, _, sampler, _ = searched(job(tmp_path, 2), tokenizer)
    order = [request.prompt[1] for request in sampler.requests]
    assert order == sorted(order)
    assert pivots == [one for one in default[0] if one.question in ("q0", "q1")]


def test_model_that_fails_ends_the_search_and_it_goes_on(default, tokenizer, tmp_path) -> None:
    class Failing(RecordingSampler):
        """Fails in the middle of the confirmations."""

        def step(self):
            if len(self.completions) > 400:
                raise SamplerError("the endpoint is gone", 0)
            return super().step()

    with pytest.raises(SamplerError, match="is gone"):
        searched(job(tmp_path, 1), tokenizer, Failing(tokenizer))
    assert not (tmp_path / FILES[0]).exists()
    pivots, _, sampler, _ = searched(job(tmp_path, 1), tokenizer)
    assert pivots == [one for one in default[0] if one.question == "q0"]
    assert not any(one.log_probs for one in sampler.requests)


def test_top_p_forbids_nothing_below_and_finds_the_same_kind(tokenizer, tmp_path) -> None:
    """A nucleus of 0.95 leaves the planted model as it is, but for what is rarely drawn."""
    search = job(tmp_path, num=1, options=replace(OPTIONS, top_p=0.95))
    pivots, _, sampler, _ = searched(search, tokenizer)
    assert not any(one.forbidden_first for one in sampler.requests)
    assert pivots and {one.position for one in pivots} <= {FORK, TURN, LAST}
    assert all(one.counterpart.id != one.token for one in pivots if one.counterpart)


def test_report_mode_is_one_tree_without_confirmation(tokenizer, tmp_path) -> None:
    search = job(tmp_path, settings=settings_of(SearchMode.REPORT, seed=3))
    pivots, _, sampler, _ = searched(search, tokenizer)
    after_screen = [one for one in sampler.requests if not one.log_probs and not one.forced]
    assert {one.n for one in after_screen} == {50}
    assert not any(one.forbidden_first for one in sampler.requests)
    assert {one.position for one in pivots} <= {FORK, TURN, LAST}
    assert pivots and all(one.e_value is None for one in pivots)
    assert all(one.counterpart.trials >= 8 for one in pivots if one.counterpart)


def test_thorough_mode_confirms_every_unsure_token(tokenizer, tmp_path) -> None:
    search = job(tmp_path, num=1, settings=settings_of(SearchMode.THOROUGH, seed=3))
    pivots, trajectories, sampler, _ = searched(search, tokenizer)
    assert all(one.forced or one.forbidden_first or one.log_probs for one in sampler.requests)
    report = json.loads((tmp_path / "report.json").read_text())
    unsure = {
        tuple(row.ids[: i + 1])
        for row in trajectories
        for i, log_prob in enumerate(row.log_probs)
        if log_prob < -0.2231
    }
    assert report["candidates"] == len(unsure)
    assert {one.position for one in pivots} <= {FORK, TURN, LAST}
    assert all(point.source in ("confirm", "verdict") for point in trajectories[0].points)


def test_questions_end_in_one_count_each(tokenizer, tmp_path) -> None:
    foreign = KeyedQuestion("foreign", (ord("Q"), ord("5")), "", None, "")

    def script(ids):
        """Of the second character: always right, never right, never finished, or planted."""
        answer, kind = ids[PROMPT_TOKENS:], ids[1] - ord("0")
        if kind in (0, 1) and len(answer) == LAST:
            return {(RIGHT, WRONG)[kind]: 1.0}
        if kind == 2 and len(answer) >= LAST:
            return {RIGHT: 1.0}
        return PlantedScript(tokenizer)(ids)

    sampler = RecordingSampler(tokenizer, script)
    search = job(tmp_path, questions=(*questions(4), foreign))
    pivots, trajectories, *_ = searched(search, tokenizer, sampler)
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["dropped"] == {"too easy": 1, "too hard": 2, "ungradable": 1}
    assert (report["questions"], report["kept"]) == (5, 1)
    # Cut off, though their text has the letter: failures, and counted.
    assert report["truncated"] == 16
    assert report["ungradable"] == 16
    assert {one.question for one in (*pivots, *trajectories)} == {"q3"}
    assert len([one for one in sampler.requests if one.prompt[1] == ord("0")]) == 1


def test_question_that_turns_ungradable_is_dropped(tokenizer, tmp_path) -> None:
    class Failing(LastLetterOracle):
        """Grades the first answers only."""

        def grade(self, answers):
            seen = len(self.answers)
            graded = super().grade(answers)
            bad = super().grade([replace(one, key=None) for one in answers])
            return [bad[i] if seen + i >= 16 else one for i, one in enumerate(graded)]

    search = job(tmp_path, num=1)
    report = search_and_write(search, RecordingSampler(tokenizer), tokenizer, Failing())
    assert report.dropped == {"ungradable": 1} and report.pivots == 0
    assert 16 < report.cost.completions < 16 + 2 * 32 * 12


def test_prompt_that_is_too_long_is_a_count(tokenizer, tmp_path) -> None:
    sampler = RecordingSampler(tokenizer)
    sampler.limits = replace(sampler.limits, max_sequence_tokens=OPTIONS.max_tokens + 1)
    pivots, _, sampler, _ = searched(job(tmp_path), tokenizer, sampler)
    assert not pivots and not sampler.requests
    assert json.loads((tmp_path / "report.json").read_text())["dropped"] == {
        "too long for the model": 3
    }


def test_pivot_without_a_counterpart_says_why(tokenizer, tmp_path) -> None:
    """The other side of the fork is spread over many tokens, more than are drawn after."""
    others = tuple(range(200, 240))

    def script(ids):
        answer = list(ids[PROMPT_TOKENS:])
        if len(answer) == FORK:
            return {GOOD: 0.4, **dict.fromkeys(others, 0.6 / len(others))}
        if len(answer) > FORK and answer[FORK] in others:
            answer[FORK] = BAD
        if len(answer) == NUM_TOKENS - 1:
            return {tokenizer.im_end_id: 1.0}
        return chances(answer)[1]

    settings = settings_of(SearchMode.DEFAULT, seed=3)
    pivots, *_ = searched(job(tmp_path / "a", 1), tokenizer, RecordingSampler(tokenizer, script))
    fork = next(one for one in pivots if one.token == GOOD)
    # The likeliest few were forced, until each had enough.
    assert fork.counterpart.id in others
    assert fork.counterpart.trials == 8

    lone = job(tmp_path / "b", 1, settings=replace(settings, counterpart_tokens=0))
    pivots, *_ = searched(lone, tokenizer, RecordingSampler(tokenizer, script))
    fork = next(one for one in pivots if one.token == GOOD)
    assert fork.counterpart is None and fork.chosen_id is None and fork.rejected_id is None
    assert fork.no_pair_reason == "no other token has 8 graded completions"


def test_same_prompt_twice_is_refused(tmp_path) -> None:
    one = questions(1)[0]
    with pytest.raises(ConfigError, match="have the same prompt"):
        job(tmp_path, questions=(one, replace(one, id="again")))
    with pytest.raises(ConfigError, match="there is no question"):
        job(tmp_path, questions=())


@pytest.mark.parametrize(("alpha", "seed"), [(0.0, 0), (1.0, 0), (0.1, -1)])
def test_settings_that_mean_nothing_are_refused(alpha: float, seed: int) -> None:
    with pytest.raises(ConfigError, match="expected"):
        settings_of(SearchMode.DEFAULT, seed, alpha)


def test_fair_token_is_no_pivot() -> None:
    """What the planted model says of itself: the tests above would be empty otherwise."""
    answer = [0xC3, 0xA9, ord("S"), ord("T"), FAIR, *map(ord, "aaa"), UP, ord("a"), RIGHT]
    effects = dict(true_effects(answer))
    assert abs(effects[FORK]) < 0.05 and effects[TURN] > 0.25 and set(effects) <= {4, 8, 10}
