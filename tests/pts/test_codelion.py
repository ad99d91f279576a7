"""Pivots of codelion's pts: every kind of its rows, and text that is not stable."""

from collections import Counter
from pathlib import Path

import pytest

from phi4.data.vocabulary.tokenizer import Tokenizer
from phi4.pts.pairs.codelion import read_codelion
from phi4.pts.pairs.pivot_file import PivotItem
from tests.pts.answer_rows import write_rows

LONGER = (b"th", b"the", b"ST")
TOKENIZER = Tokenizer(
    {token: n for n, token in enumerate([bytes([b]) for b in range(256)] + list(LONGER))}
)
THE = 257
LEGACY = {
    "query": "why?",
    "pivot_context": "because ",
    "pivot_token": "the",
    "prob_delta": 0.3,
    "rejected_token": "a",
    "task_type": "qa",
}


def read(tmp_path: Path, *rows: dict) -> tuple[list[PivotItem], Counter]:
    left_out: Counter[str] = Counter()
    path = write_rows(tmp_path / "rows.jsonl", rows)
    return list(read_codelion(path, TOKENIZER, left_out)), left_out


def event(**more: object) -> dict:
    row = {"event_type": "pivotal_token", "context": "because ", "label": "the", "prob_delta": 0.3}
    return row | {"task_type": "qa", "query": "why?"} | more


@pytest.mark.parametrize(
    "row",
    [
        LEGACY,
        event(metadata={"rejected_token": "a"}),
        {
            "prompt": "because ",
            "chosen": "the",
            "rejected": "a",
            "metadata": {"prob_delta": 0.3, "task_type": "qa", "query": "why?"},
        },
    ],
    ids=["legacy", "event", "dpo export"],
)
def test_every_form_is_the_same_pivot(tmp_path: Path, row: dict) -> None:
    (item,), left_out = read(tmp_path, row)
    assert item.prefix.tolist() == TOKENIZER.encode("because ")
    assert (item.chosen, item.rejected) == (THE, ord("a"))
    assert (item.dp, item.task, item.question) == (0.3, "qa", "why?")
    assert not left_out


def test_token_that_lowers_success_is_the_rejected_one(tmp_path: Path) -> None:
    row = event(prob_delta=-0.3, metadata={"chosen_token": "a"})
    (item,), _ = read(tmp_path, row)
    assert (item.chosen, item.rejected, item.token) == (ord("a"), THE, THE)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        # Together they are one token, and the context loses its last one to it.
        ({"pivot_context": "because t", "pivot_token": "he"}, "the context encodes differently"),
        ({"pivot_token": "then"}, "not one token of this vocabulary"),
        ({"pivot_token": ""}, "a token that is not text"),
        ({"pivot_token": None}, "no token"),
        ({"prob_delta": None}, "no prob_delta"),
        ({"pivot_context": ""}, "no context"),
        ({"pivot_token": 7}, "a token that is not text"),
        ({"event_type": "thought_anchor"}, "no pivotal token"),
    ],
)
def test_row_that_cannot_be_told_in_ids_is_left_out(tmp_path, change, reason: str) -> None:
    items, left_out = read(tmp_path, LEGACY, LEGACY | change)
    assert len(items) == 1
    ((found, count),) = left_out.items()
    assert found.startswith(reason) and count == 1


def test_counterpart_may_be_missing(tmp_path: Path) -> None:
    (item,), _ = read(tmp_path, event())
    assert (item.chosen, item.rejected) == (THE, None)
