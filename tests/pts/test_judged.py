"""Judged pairs: both orders, abstentions, what an answer cannot do, and rows that DPO reads."""

import json
import random
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phi4.cli import main
from phi4.data.preference.encode import encode_preference
from phi4.errors import ConfigError, DataError
from phi4.oracles.exact import ExactOracle
from phi4.pts.answer_groups import AnswerGroups
from phi4.pts.answer_turns import turns_of
from phi4.pts.judged.assess import BothOrders, ByOracle
from phi4.pts.judged.job import judge_pairs
from phi4.pts.judged.recipe import JudgeRecipe, PairsSection, load_judge_recipe
from phi4.pts.judged.report import JudgeReport
from phi4.pts.judged.verdicts import PairSet, decide
from phi4.sampling.judge import Judge
from phi4.sampling.judge_reply import Ratings
from tests.pts.answer_rows import TOKENIZER, Said, read_rows, write_answers, write_ranks
from tests.pts.judges import FunctionJudge, always_first, honest, opinion, quality
from tests.sampling.test_judge import PLANTED

DEFAULTS = PairsSection()
SETS = ("overall.jsonl", "accuracy.jsonl")


def judge(
    tmp_path: Path, said: Sequence[Said], judge: Judge, pairs: PairsSection = DEFAULTS
) -> JudgeReport:
    groups = AnswerGroups([write_answers(tmp_path / "answers.jsonl", said)])
    turns = partial(turns_of, tokenizer=TOKENIZER)
    return judge_pairs(groups, BothOrders(judge, 2, turns), pairs, tmp_path / "out")


def three_models(num: int) -> list[Said]:
    """Answers of quality 1, 3 and 5, by models in changing order."""
    return [
        Said(f"q{index}", f"{[1, 3, 5][(place + index) % 3]} says {model}", model)
        for index in range(num)
        for place, model in enumerate("abc")
    ]


def test_all_combinations_are_pairs_in_both_sets(tmp_path: Path) -> None:
    report = judge(tmp_path, three_models(4), FunctionJudge(honest))
    for name in SETS:
        rows = read_rows(tmp_path / "out" / name)
        assert len(rows) == 4 * 3
        for row in rows:
            encode_preference(row, TOKENIZER, 4096)
            better, worse = (TOKENIZER.decode(row[side]) for side in ("chosen_ids", "rejected_ids"))
            assert quality(better) > quality(worse)
            assert better[7] == row["chosen_from"]["model"]
            assert len(row["chosen_from"]["ratings"]) == 2
    assert (report.counts["prompts"], report.counts["comparisons"]) == (4, 12)
    assert report.words() == []
    means = {name: sums.means()["overall"] for name, sums in report.models.items()}
    assert means == pytest.approx({"a": 2.5, "b": 3.0, "c": 3.5})
    scores = read_rows(tmp_path / "out/scores.jsonl")
    assert len(scores) == 12 and {row["ratings"] for row in scores} == {4}


def test_judge_that_always_says_first_abstains_from_everything(tmp_path: Path) -> None:
    report = judge(tmp_path, three_models(5), FunctionJudge(always_first))
    assert [read_rows(tmp_path / "out" / name) for name in SETS] == [[], []]
    found = json.loads((tmp_path / "out/report.json").read_text())
    assert {name: s["abstained_share"] for name, s in found["sets"].items()} == dict.fromkeys(
        ("overall", "accuracy"), 1.0
    )
    printed = "\n".join(report.lines())
    assert "100.0%" in printed
    assert "contradicts itself in all comparisons" in printed
    assert "shown first in 30 of 30" in printed and found["words"] == report.words()


@pytest.mark.parametrize("planted", PLANTED)
@pytest.mark.parametrize("place", ["winner", "loser"])
def test_verdict_in_an_answer_changes_nothing(planted: str, place: str, tmp_path: Path) -> None:
    texts = {"winner": "5 is right", "loser": "1 is wrong"}
    texts[place] += planted
    said = [Said("q", text, name) for name, text in texts.items()]
    judge(tmp_path, said, FunctionJudge(honest))
    for name in SETS:
        (row,) = read_rows(tmp_path / "out" / name)
        assert (row["chosen_from"]["model"], row["rejected_from"]["model"]) == ("winner", "loser")
        # Its special tokens are text.
        assert row["chosen_ids"].count(TOKENIZER.im_end_id) == 1


def test_judge_that_repeats_a_planted_object_says_nothing(tmp_path: Path) -> None:
    planted = opinion(5, 1)
    for echo in (planted, f"{planted}\n{opinion(1, 5)}"):
        said = [Said("q", planted, "a"), Said("q", "the truth", "b")]
        report = judge(tmp_path, said, FunctionJudge(lambda showing, attempt, e=echo: e))
        assert report.counts["invalid"] == 1 and report.judged == 0
        assert read_rows(tmp_path / "out/overall.jsonl") == []


def test_truncated_replies_are_neither_tie_nor_win(tmp_path: Path) -> None:
    cut = FunctionJudge(lambda showing, attempt: honest(showing, attempt)[:-4])
    report = judge(tmp_path, three_models(1), cut)
    assert report.counts["invalid"] == 3
    assert all(not counts.total() for counts in report.sets.values())
    rows = read_rows(tmp_path / "out/quarantine.jsonl")
    # Three comparisons in two orders, three attempts each.
    assert len(rows) == 18 and all(row["reason"].startswith("truncated") for row in rows)
    assert {row["attempt"] for row in rows} == {0, 1, 2} and rows[0]["reply"].startswith("{")


def test_one_order_without_an_opinion_is_no_verdict(tmp_path: Path) -> None:
    half = FunctionJudge(lambda s, attempt: "no" if s.first > s.second else honest(s, attempt))
    assert judge(tmp_path, three_models(1), half).counts["invalid"] == 3


def biased_judge(seed: int, bias: float, error: float) -> FunctionJudge:
    """One that sometimes takes the first answer unseen, and errs on the others now and then."""
    chance = random.Random(seed)

    def reply(showing, attempt: int) -> str:
        if chance.random() < bias:
            return opinion(4, 2)
        right = quality(showing.first) > quality(showing.second)
        return opinion(4, 2) if right != (chance.random() < error) else opinion(2, 4)

    return FunctionJudge(reply)


def test_two_orders_make_precise_pairs_of_a_biased_judge(tmp_path: Path) -> None:
    said = [
        Said(f"q{n}", f"{score} {model}", model)
        for n in range(600)
        for model, score in zip("ab", [(5, 1), (1, 5)][n % 2], strict=True)
    ]
    report = judge(tmp_path, said, biased_judge(1, bias=0.2, error=0.1))
    rows = read_rows(tmp_path / "out/accuracy.jsonl")
    right = sum(TOKENIZER.decode(row["chosen_ids"]).startswith("5") for row in rows)
    assert right / len(rows) >= 0.95
    found = report.sets[PairSet.ACCURACY]
    # The better one wins in front of the other with .92 and behind it with .72: orders contradict
    # each other with .92 x .28 + .08 x .72 = .315.
    assert found["flipped"] / 600 == pytest.approx(0.315, abs=0.05)
    assert found["pair"] + found["flipped"] == 600
    assert report.shown_first["first"] > 1.3 * report.shown_first["second"]


def rated(*scores: int) -> Ratings:
    return Ratings(**dict(zip(("accuracy", "style", "detail"), scores, strict=True)))


@pytest.mark.parametrize(
    ("orders", "combine", "overall", "accuracy"),
    [
        ([(5, 3), (5, 3)], "both", "pair", "pair"),
        ([(5, 3), (3, 3)], "both", "tied", "tied"),
        ([(5, 3), (3, 3)], "mean", "pair", "pair"),
        ([(4, 3), (3, 3)], "mean", "pair", "tied"),
        ([(5, 1), (2, 3)], "mean", "flipped", "flipped"),
        ([(3, 3), (3, 3)], "both", "tied", "tied"),
    ],
)
def test_orders_are_combined(orders, combine, overall: str, accuracy: str) -> None:
    ratings = [(rated(a, a, a), rated(b, b, b)) for a, b in orders]
    pairs = PairsSection(combine=combine)
    assert decide(ratings, PairSet.OVERALL, pairs).outcome == overall
    assert decide(ratings, PairSet.ACCURACY, pairs).outcome == accuracy


def test_sets_can_prefer_different_answers() -> None:
    ratings = [(rated(5, 1, 1), rated(4, 5, 5))] * 2
    found = {name: decide(ratings, name, PairsSection()) for name in PairSet}
    assert found[PairSet.ACCURACY].left_wins and not found[PairSet.OVERALL].left_wins


@settings(max_examples=40)
@given(st.lists(st.tuples(*[st.integers(1, 5)] * 6), min_size=2, max_size=2))
def test_swapped_sides_swap_the_verdict(scores: list) -> None:
    ratings = [(rated(*s[:3]), rated(*s[3:])) for s in scores]
    swapped = [(right, left) for left, right in ratings]
    for pair_set in PairSet:
        one, other = (decide(r, pair_set, PairsSection()) for r in (ratings, swapped))
        assert one.outcome == other.outcome
        assert one.difference == pytest.approx(-other.difference)


def test_identical_and_empty_answers_are_left_out_and_cut_ones_marked(tmp_path: Path) -> None:
    said = [
        Said("q", "5 same", "a"),
        Said("q", "5 same", "b"),
        Said("q", "1 cut", "c", ended=False),
        Said("q", "", "d", ended=False),
    ]
    report = judge(tmp_path, said, FunctionJudge(honest))
    assert {name: report.counts[name] for name in ("identical", "empty", "cut_off")} == {
        "identical": 1,
        "empty": 1,
        "cut_off": 2,
    }
    rows = read_rows(tmp_path / "out/overall.jsonl")
    assert [row["rejected_from"]["cut_off"] for row in rows] == [True, True]
    assert not any(row["chosen_from"]["cut_off"] for row in rows)


def test_own_samples_are_compared_only_where_asked(tmp_path: Path) -> None:
    said = [Said("q", f"{score} x", sample=score) for score in (1, 3, 5)]
    report = judge(tmp_path, said, FunctionJudge(honest))
    assert report.counts["comparisons"] == 0 and "Nothing was compared" in report.words()[0]
    pairs = PairsSection(same_model=True)
    assert judge(tmp_path, said, FunctionJudge(honest), pairs).counts["comparisons"] == 3


def test_comparisons_of_a_prompt_are_drawn_by_seed(tmp_path: Path) -> None:
    found = []
    for seed in (0, 0, 1):
        pairs = PairsSection(max_per_prompt=1, seed=seed)
        report = judge(tmp_path, three_models(12), FunctionJudge(honest), pairs)
        assert (report.counts["comparisons"], report.counts["not_drawn"]) == (12, 24)
        found.append((tmp_path / "out/overall.jsonl").read_text())
    assert found[0] == found[1] != found[2]


def test_oracle_needs_no_order_and_both_sets_follow_accuracy(tmp_path: Path) -> None:
    said = [
        Said("q", "4", "a", key="4"),
        Said("q", "5", "b", key="4"),
        Said("q", "4", "c", key="4", ended=False),
        Said("p", "x", "a", key=None),
        Said("p", "y", "b", key=None),
    ]
    groups = AnswerGroups([write_answers(tmp_path / "a.jsonl", said)])
    report = judge_pairs(groups, ByOracle(ExactOracle()), PairsSection(), tmp_path / "out")
    overall, accuracy = (read_rows(tmp_path / "out" / name) for name in SETS)
    assert [(r["chosen_from"]["model"], r["rejected_from"]["model"]) for r in overall] == [
        ("a", "b")
    ]
    assert [row["chosen_ids"] for row in accuracy] == [overall[0]["chosen_ids"]]
    assert overall[0]["judge"] == "oracle:exact"
    # Cut off, "4" is as wrong as 5; the same text as a finished one is identical.
    assert report.sets[PairSet.OVERALL] == {"pair": 1, "tied": 1}
    assert (report.counts["ungradable"], report.counts["identical"]) == (1, 1)


def test_command_with_an_oracle(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    files = [
        write_answers(tmp_path / f"{m}.jsonl", [Said("q", text, m, key="4")])
        for m, text in (("a", "4"), ("b", "5"))
    ]
    argv = ["judge", "pairs", "--judge", "oracle:exact", "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as stop:
        main([*argv, *(f"--answers={path}" for path in files), "pairs.max_per_prompt=2"])
    assert not stop.value.code
    printed = capsys.readouterr().out
    assert "1 prompts, 1 comparisons" in printed and "judge oracle:exact" in printed
    prefix, ranks = str(tmp_path / "pairs"), str(write_ranks(tmp_path / "ranks"))
    with pytest.raises(SystemExit):
        main(["data", "pairs", f"{tmp_path}/out/overall.jsonl", "--out", prefix, "--ranks", ranks])
    assert "1 pairs from 1 rows, 0 rows left out" in capsys.readouterr().out


def test_files_that_cannot_be_compared_are_refused(tmp_path: Path) -> None:
    one = write_answers(tmp_path / "a.jsonl", [Said("q", "x")])
    with pytest.raises(DataError, match="sample 0 of a to question 'q' is also at"):
        list(AnswerGroups([one, one]))
    other = write_answers(tmp_path / "b.jsonl", [Said("q", "x", "b", chat=False)])
    with pytest.raises(DataError, match="has a different prompt at"):
        list(AnswerGroups([one, other]))
    foreign = Said("q", "x").row()
    foreign.ids[0] = 77
    with pytest.raises(DataError, match="ids of another tokenizer"):
        turns_of(foreign, TOKENIZER)


def test_questions_of_several_files_come_in_order(tmp_path: Path) -> None:
    names = "zyx"
    one = write_answers(tmp_path / "a.jsonl", [Said(q, "x") for q in names])
    other = write_answers(tmp_path / "b.jsonl", [Said(q, "x", "b") for q in reversed(names)])
    found = [[(row.question, row.model) for row in rows] for rows in AnswerGroups([one, other])]
    assert found == [[(q, "a"), (q, "b")] for q in names]


def test_recipe(tmp_path: Path) -> None:
    path = tmp_path / "judge.toml"
    path.write_text("[ask]\nretries = 5\n[pairs]\ncombine = 'mean'\n")
    found = load_judge_recipe(path, ["pairs.overall_margin=0.75", "pairs.combine=both"])
    assert (found.ask.retries, found.pairs.overall_margin, found.pairs.combine) == (5, 0.75, "both")
    assert load_judge_recipe(None) == JudgeRecipe()
    for wrong in ("ask.retry=3", "pairs.combine=all", "pairs.accuracy_margin=0.0", "ask.retries=x"):
        with pytest.raises(ConfigError, match=wrong.partition("=")[0]):
            load_judge_recipe(path, [wrong])
