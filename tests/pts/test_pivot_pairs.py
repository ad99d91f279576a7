"""Pairs of single tokens: each pivot once, the mixture's law, and text that is the same ids."""

import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phi4.cli import main
from phi4.data.preference.encode import encode_preference
from phi4.data.vocabulary.chat import Message, Role
from phi4.data.vocabulary.tokenizer import Tokenizer
from phi4.errors import ConfigError, DataError
from phi4.pts.pairs.choose import MixtureRules, choose, task_quotas
from phi4.pts.pairs.formats import trl_rows
from phi4.pts.pairs.job import PairFormat, PairReport, write_pairs
from phi4.pts.pairs.pivot_file import PivotItem, Trajectories, read_pivot_files
from phi4.sampling.chat import chat_prompt
from tests.pts.answer_rows import TOKENIZER, read_rows, write_ranks, write_rows

PROMPT = list(chat_prompt((Message(Role.USER, "2+2?"),), TOKENIZER))
ANSWER = TOKENIZER.encode("it is four, so 4")
AS_FOUND = MixtureRules()


def pivot(position: int, *, raises: bool = True, other: int | None = 90, **more: object) -> dict:
    """A row of `phi4 pts search`: the token of ANSWER at a position, and another one."""
    answer = more.get("answer_ids", ANSWER)
    token = answer[position]
    paired = (token if raises else other, other if raises else token)
    row = {
        "question": "q",
        "task": "math",
        "model": "m",
        "prompt_ids": PROMPT,
        "answer_ids": ANSWER,
        "position": position,
        "token": token,
        "q": 0.5,
        "dp_at_confirmation": 0.4 if raises else -0.4,
        "e_value": 20.0,
        "with_token": {"successes": 9 if raises else 1, "trials": 10},
        "without_token": {"successes": 5, "trials": 10},
        "counterpart": None if other is None else {"id": other, "successes": 5, "trials": 10},
        "chosen_id": None if other is None else paired[0],
        "rejected_id": None if other is None else paired[1],
        "no_pair_reason": "too few completions" if other is None else "",
        "trajectory": "q/right",
    }
    return row | more


def made(
    tmp_path: Path,
    rows: list[dict],
    rules: MixtureRules = AS_FOUND,
    form: PairFormat = PairFormat.IDS,
) -> tuple[list[dict], PairReport]:
    write_rows(tmp_path / "pivots.jsonl", rows)
    report, out = PairReport(), tmp_path / "out.jsonl"
    write_pairs(read_pivot_files([tmp_path]), rules, form, TOKENIZER, out, report)
    assert report.num_pairs + report.left_out.total() == report.num_read == len(rows)
    return read_rows(out), report


def pairs_of(rows: list[dict]) -> Counter:
    """Prefix, better and worse token, from rows of ids, as training sees them."""
    found = Counter()
    for row in rows:
        document = encode_preference(row, TOKENIZER, 4096)
        ids, *columns = (sequence.tolist() for sequence in document.sequences)
        for position, chosen, rejected in zip(*columns, strict=True):
            found[tuple(ids[: position + 1]), chosen, rejected] += 1
    return found


def test_all_pivots_of_both_signs_are_there_once(tmp_path: Path) -> None:
    rows = [pivot(n, raises=n % 2 == 0) for n in range(len(ANSWER))]
    found, report = made(tmp_path, rows)
    expected = {
        ((*PROMPT, *ANSWER[:n]), *((ANSWER[n], 90) if n % 2 == 0 else (90, ANSWER[n])))
        for n in range(len(ANSWER))
    }
    assert pairs_of(found) == dict.fromkeys(expected, 1)
    # One trajectory, one forward pass, as long as its last pivot needs.
    (row,) = found
    assert row["ids"] == [*PROMPT, *ANSWER[:-1]]
    assert report.tasks == {("math", "+"): 8, ("math", "-"): 8}


def test_space_that_trl_would_lose_leaves_a_pair_out(tmp_path: Path) -> None:
    """phi-4's published tokenizer drops it on both sides of a special token."""
    spaced = TOKENIZER.encode("  four")
    pivots = [pivot(0, answer_ids=spaced), pivot(len(spaced) - 1, answer_ids=spaced)]
    behind = pivot(2)
    assert TOKENIZER.bytes_of(behind["token"]) == b" "
    rows, report = made(tmp_path, [*pivots, behind, pivot(3)], form=PairFormat.TRL)
    assert [row["prompt"].endswith("it ") for row in rows] == [True]
    assert sorted(report.left_out.values()) == [1, 2]


def test_two_pairs_at_one_place_are_two_rows(tmp_path: Path) -> None:
    found, _ = made(tmp_path, [pivot(1), pivot(3), pivot(1, other=91)])
    assert [[p["position"] for p in row["pivots"]] for row in found] == [
        [len(PROMPT), len(PROMPT) + 2],
        [len(PROMPT)],
    ]
    assert pairs_of(found).total() == 3


def test_pivots_of_other_trajectories_are_other_rows(tmp_path: Path) -> None:
    found, _ = made(tmp_path, [pivot(1), pivot(2, answer_ids=[*ANSWER, 5])])
    assert [len(row["pivots"]) for row in found] == [1, 1]


def test_what_is_no_pair_is_left_out_with_the_reason(tmp_path: Path) -> None:
    # The first three tokens are those of the other trajectory too.
    again = pivot(2, answer_ids=[*ANSWER[:3], 5], question="q2")
    # The other token there, in a trajectory that has it.
    reverse = pivot(5, answer_ids=[*ANSWER[:5], 90], other=ANSWER[5])
    rows = [pivot(2), again, pivot(3, other=None), pivot(4, other=ANSWER[4]), pivot(5), reverse]
    found, report = made(tmp_path, rows)
    assert pairs_of(found).total() == 1
    assert report.left_out == {
        "duplicate of another pivot": 1,
        "too few completions": 1,
        "both tokens are equal": 1,
        "contradicts another pivot": 2,
    }
    assert json.loads((tmp_path / "out.jsonl.report").read_text())["left_out"] == report.left_out


def test_file_without_a_pair_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="of 1 pivots, too few completions: 1"):
        made(tmp_path, [pivot(3, other=None)])
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"position": 99}, "position 99 of 16 ids"),
        ({"position": -1}, "position -1 of"),
        ({"chosen_id": 3}, "chosen_id is 3, but the token at its position"),
        ({"dp_at_confirmation": 0}, "dp_at_confirmation is 0"),
        ({"prompt_ids": []}, "prompt_ids is empty"),
        ({"prompt_ids": [1 << 40]}, "out of bounds"),
        ({"chosen_id": "x"}, "Expected `int | null`"),
    ],
)
def test_malformed_pivot_is_refused(tmp_path: Path, change: dict, fault: str) -> None:
    with pytest.raises(DataError, match=f"pivots.jsonl:2 is not a pivot: .*{fault}"):
        made(tmp_path, [pivot(3), pivot(0) | change])


COUNTS = st.dictionaries(st.sampled_from("abcde"), st.integers(1, 60), min_size=1)
SHARE = st.sampled_from([0.05, 0.1, 0.3, 1 / 3, 0.5, 0.531, 1, 2, 7])


@given(COUNTS, st.data(), st.integers(0, 80))
def test_quotas_are_the_largest_mixture_of_the_shares(available, data, max_pairs: int) -> None:
    shares = {task: data.draw(SHARE) for task in available}
    quotas = task_quotas(available, shares, max_pairs)
    number, total = sum(quotas.values()), sum(shares.values())
    for task, share in shares.items():
        assert quotas[task] <= available[task]
        assert abs(quotas[task] - number * share / total) < 1
    # One more would exceed the limit, or what a task has.
    too_many = [(number + 1) * shares[t] / total > available[t] - 1e-6 for t in shares]
    assert number == max_pairs or any(too_many)
    assert not max_pairs or number <= max_pairs


ITEMS = st.lists(st.tuples(st.sampled_from("ab"), st.booleans()), min_size=1, max_size=40)


def items_of(kinds: list[tuple[str, bool]]) -> list[PivotItem]:
    trajectories = Trajectories()
    return [
        PivotItem("q", task, "m", trajectories.of([n, 1]), 1, 1, 5, 6, 0.4 if raises else -0.4)
        for n, (task, raises) in enumerate(kinds)
    ]


@settings(max_examples=60)
@given(ITEMS, st.booleans(), st.integers(0, 20), st.integers(0, 3))
def test_balance_equalises_signs_and_tasks(kinds, with_shares, max_pairs: int, seed: int) -> None:
    items = items_of(kinds)
    signs = Counter(kinds)
    least = {t: min(signs[t, True], signs[t, False]) for t in {task for task, _ in kinds}}
    shares = {task: 3.0 if task == "a" else 1.0 for task, count in least.items() if count}
    rules = MixtureRules(shares if with_shares else {}, True, max_pairs, seed)
    kept = choose(items, rules)
    found = Counter((item.task, item.dp > 0) for item in kept)
    assert all(found[task, True] == found[task, False] <= least[task] for task in least)
    usable = [task for task, count in least.items() if count]
    if not with_shares and usable and not max_pairs:
        assert {found[task, True] for task in usable} == {min(least[task] for task in usable)}
    assert not max_pairs or len(kept) <= max_pairs
    assert [items.index(item) for item in kept] == sorted(items.index(item) for item in kept)
    # What is left out does not depend on the order of the files.
    again = choose(items[::-1], rules)
    assert {id(item) for item in again} == {id(item) for item in kept}


def test_share_of_a_task_without_pivots_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"--share b=...: no pivot has this task; .* a 1"):
        choose(items_of([("a", True)]), MixtureRules({"b": 1.0}))


def test_trl_rows_encode_to_their_ids(tmp_path: Path) -> None:
    # Behind half a character there is no text; a name that was typed reads as the token itself.
    half = pivot(2, answer_ids=[65, 0xC3, *ANSWER])
    typed = TOKENIZER.encode("<|im_end|>")
    name = pivot(len(typed), answer_ids=[*typed, 105])
    rows = [pivot(3), half, name]
    found, report = made(tmp_path, rows, form=PairFormat.TRL)
    (row,) = found
    assert (
        row["prompt"]
        == "<|im_start|>user<|im_sep|>2+2?<|im_end|><|im_start|>assistant<|im_sep|>it "
    )
    assert (row["chosen"], row["rejected"]) == ("i", "Z")
    assert report.left_out == {"its text does not encode to its ids": 2}


def test_token_that_text_would_merge_with_its_prefix_is_left_out(tmp_path: Path) -> None:
    ranks = {token: n for n, token in enumerate([*(bytes([b]) for b in range(256)), b"it"])}
    merging = Tokenizer(ranks)
    trajectory = Trajectories().of([*b"so i"])
    items = [
        PivotItem("q", "", "m", trajectory, 1, 4, chosen, rejected, 0.4)
        for chosen, rejected in ((ord("t"), ord("s")), (ord("s"), ord("t")), (ord("s"), ord("f")))
    ]
    left_out: Counter[str] = Counter()
    rows = [row for _, row in trl_rows(items, merging, left_out)]
    assert [(row["chosen"], row["rejected"]) for row in rows] == [("s", "f")]
    assert left_out.total() == 2


def test_codelions_rows_there_and_back(tmp_path: Path) -> None:
    rows = [pivot(3), pivot(5, raises=False, task="code"), pivot(6, other=None)]
    found, _ = made(tmp_path, rows, form=PairFormat.CODELION)
    assert [row["is_positive"] for row in found] == [True, False, True]
    assert found[2]["pivot_token"] == "f"
    assert (found[0]["query"], found[0]["pivot_token"], found[0]["pivot_token_id"]) == (
        "2+2?",
        "i",
        105,
    )
    assert found[0]["prob_before"] == pytest.approx(0.7) and found[0]["prob_after"] == 0.9
    assert found[1]["chosen_token"] == "Z" and found[2]["rejected_token"] is None
    out, ranks = tmp_path / "back.jsonl", write_ranks(tmp_path / "ranks")
    argv = ["pts", "pairs", "--from-codelion", tmp_path / "out.jsonl", "--ranks", ranks]
    with pytest.raises(SystemExit) as stop:
        main(list(map(str, [*argv, "--out", out])))
    assert not stop.value.code
    direct, _ = made(tmp_path, rows)
    assert pairs_of(read_rows(out)) == pairs_of(direct)
    assert {row["task"] for row in read_rows(out)} == {"math", "code"}
