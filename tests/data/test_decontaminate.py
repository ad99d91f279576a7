import gzip
import json
import random
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from phi4.data.screens.decontaminate import (
    Detector,
    Finding,
    Item,
    Thresholds,
    decontaminate,
    learn_allowed,
    read_benchmarks,
)
from phi4.data.screens.decontaminate.index import NgramIndex, windows
from phi4.data.screens.decontaminate.normalise import paper, robust
from phi4.errors import DataError

# The report's worked example, appendix B.1: a training text and the test item found in it.
TRAIN = (
    "There are some oarsmen in a boat. The average weight is increased by 1.8 kg when one of the "
    "crew, who weighs 53 kg, is replaced by a new man who weighs 71 kg. How many oarsmen are there "
    "in the boat?"
)
TEST = (
    "The average weight of 10 oarsmen in a boat is increased by 1.8 kg when one of the crew, who "
    "weighs 53 kg is replaced by a new man. Find the weight of the new man.A. 71 B.62 C.43 D.67 "
    "E.40"
)
WORDS = [f"{a}{b}" for a in "bcdfgh" for b in "aeiou"]
WORD_LISTS = st.lists(st.sampled_from(WORDS[:4]), max_size=30)


def text_of_words(start: int, num_words: int) -> str:
    """A text in which no 7-gram repeats."""
    return " ".join(
        f"{WORDS[i % 30]}{WORDS[i // 30 % 30]}" for i in range(start, start + num_words)
    )


def item(text: str, benchmark: str = "bench") -> Item:
    return Item(benchmark, 1, text)


def rows(path: Path, *texts: str) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_paper_gives_the_worked_ratio() -> None:
    train, test = ({*windows(paper(text), 7)} for text in (TRAIN, TEST))
    assert (len(train), len(test), len(train & test)) == (38, 41, 15)
    verdict = Detector([item(TEST)], "paper").check(TRAIN)
    assert verdict.finding is Finding.LONG_MATCH
    assert verdict.matches[0].ratio == 15 / 38 == 0.39473684210526316
    assert "one of the crew who weighs 53 kg is replaced by a new" in verdict.matches[0].grams


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("1.8 kg, one.", ["1", "8", "kg", "one", ""]),
        ("A (ii) and (iv) only", ["a", "(ii)", "and", "(iv)", "only"]),
        ("Two\nlines", ["two\nlines"]),
    ],
)
def test_paper_words(text: str, words: list[str]) -> None:
    assert paper(text) == words


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("It's A\nTEST—of_this (ii).", ["it", "s", "a", "test", "of", "this", "ii"]),
        ("1,000 1'000 1\u202f000 1000.0 01000 １０００ ١٠٠٠", ["1000"] * 7),
        ("1.8 1.80 v2 .5 0.50", ["1", "8", "1", "8", "v2", "0", "5", "0", "5"]),
        ("1,2,300 12,34 5,1,000", ["1", "2", "300", "12", "34", "5", "1", "0"]),
        ("3.11.7", ["3", "11", "7"]),
        (
            "Straße ﬁne cafe\u0301 soft\u00adhyphen ＡＢ",
            ["strasse", "fine", "café", "softhyphen", "ab"],
        ),
        ("北京 is カナ", ["北", "京", "is", "カ", "ナ"]),
        ("हिन्दी में", ["हिन्दी", "में"]),
        ("... !", []),
        (
            "A&nbsp;B &lt;i&gt; R&amp;D x&#39;y &amp;nbsp;c",
            ["a", "b", "i", "r", "d", "x", "y", "c"],
        ),
        ("f(&copy, &unknown; a&b)", ["f", "copy", "unknown", "a", "b"]),
        ("1&nbsp;000", ["1000"]),
        ("exam-\nple hyphen- ated soft\u00ad\n  ened", ["example", "hyphenated", "softened"]),
        ("well-known 1-\n2 a - b", ["well", "known", "1", "2", "a", "b"]),
        ("one\u200btwo in\u200dside", ["one", "two", "inside"]),
    ],
)
def test_robust_words(text: str, words: list[str]) -> None:
    assert robust(text) == words


@given(st.text(st.sampled_from("aB1, .\n\tß０é-"), max_size=60))
def test_robust_words_are_stable(text: str) -> None:
    words = robust(text)
    assert robust(text.upper()) == words
    assert robust(re.sub(r"\s", "\n", text)) == words
    assert robust(" ".join(words)) == words


@given(WORD_LISTS, WORD_LISTS, st.lists(WORD_LISTS, min_size=1, max_size=4))
def test_index_finds_what_sets_find(document, other, tests) -> None:
    index = NgramIndex(tests, (3, 5))
    words = [*document, "unknown", *other]
    for n in (3, 5):
        starts, grams = index.find(index.number(words), n)
        known = {gram for test in tests for gram in windows(test, n)}
        expected = [i for i, gram in enumerate(windows(words, n)) if gram in known]
        assert starts.tolist() == expected
        found = [tuple(words[start : start + n]) for start in starts]
        assert [tuple(index.text(n, gram).split()) for gram in grams] == found
        owners, owned = index.tests_of(n, grams)
        for owner, gram in enumerate(found):
            have = [i for i, test in enumerate(tests) if gram in set(windows(test, n))]
            assert owned[owners == owner].tolist() == have
        assert index.num_grams[n].tolist() == [len(set(windows(test, n))) for test in tests]


@given(WORD_LISTS, st.lists(WORD_LISTS, min_size=1, max_size=4))
def test_ratio_is_the_definition(document, tests) -> None:
    detector = Detector([item(" ".join(test)) for test in tests], thresholds=Thresholds(0, 0))
    ours, theirs = {*windows(document, 7)}, [{*windows(test, 7)} for test in tests]
    expected = {
        index: len(ours & grams) / min(len(ours), len(grams))
        for index, grams in enumerate(theirs)
        if ours & grams
    }
    found = {match.item: match.ratio for match in detector.check(" ".join(document)).matches}
    assert found == expected


@pytest.mark.parametrize(
    ("shared", "finding"),
    [
        (13, Finding.LONG_MATCH),
        (12, Finding.SHORT_MATCH),  # 6 of 20 7-grams
        (11, Finding.SHORT_MATCH),  # 5 of 20: exactly the threshold
        (10, Finding.PARTIAL),
        (9, Finding.PARTIAL),
        (8, Finding.CLEAN),  # 2 of 20: not above the threshold
        (6, Finding.CLEAN),
    ],
)
def test_rule_at_its_thresholds(shared: int, finding: Finding) -> None:
    detector = Detector([item(text_of_words(0, 26))], thresholds=Thresholds(0.1, 0.25))
    text = f"{text_of_words(100, 30)} {text_of_words(5, shared)} {text_of_words(200, 30)}"
    assert detector.check(text).finding is finding


def test_smaller_text_is_the_measure() -> None:
    detector = Detector([item(text_of_words(0, 300))])
    assert detector.check(text_of_words(40, 12)).matches[0].ratio == 1.0


def test_re_wrapped_text_is_lost_to_paper_and_found_by_robust() -> None:
    words = text_of_words(0, 48).split()
    wrapped = "\n".join(" ".join(words[i : i + 8]) for i in range(0, 48, 8))
    items = [item(text_of_words(0, 48))]
    assert not Detector(items, "paper").check(wrapped).finding.contaminated
    assert Detector(items, "robust").check(wrapped).finding is Finding.LONG_MATCH


def test_item_without_spaces_is_found_inside_a_longer_text() -> None:
    letters = "กขคงจฉชซญดตถทธนบปผฝพฟภมยรลวสหอะาิีึืุูเแโใไ่้"
    generator = random.Random(0)
    quiz, before, after, other = ("".join(generator.choices(letters, k=150)) for _ in range(4))
    detector = Detector([item(quiz)])
    assert detector.check(before + quiz + after).finding is Finding.LONG_MATCH
    assert detector.check(f"{before} {quiz[:75]}\n{quiz[75:]} {after}").finding.contaminated
    assert detector.check("\u200b".join(quiz)).finding is Finding.LONG_MATCH
    assert detector.check(before + other + after).finding is Finding.CLEAN


def test_common_phrase_is_allowed_and_named(tmp_path: Path) -> None:
    phrase = text_of_words(0, 13)
    detector = Detector([item(f"{phrase} {text_of_words(400, 90)}")])
    text = f"{text_of_words(100, 30)} {phrase} {text_of_words(200, 90)}"
    assert detector.check(text).finding is Finding.LONG_MATCH
    once = rows(tmp_path / "once.jsonl", phrase, text_of_words(600, 30))
    learn_allowed(detector, [once], min_texts=2)
    assert detector.check(text).finding is Finding.LONG_MATCH
    twice = rows(tmp_path / "twice.jsonl", phrase.upper(), f"x {phrase}")
    learn_allowed(detector, [twice], min_texts=2)
    assert detector.allowed() == [phrase]
    assert detector.check(text).finding is Finding.CLEAN


def benchmarks(tmp_path: Path) -> list[Path]:
    one = tmp_path / "quiz.jsonl"
    columns = {"id": "q-1", "question": text_of_words(0, 20), "choices": {"text": ["yes", "no"]}}
    one.write_text(json.dumps(columns) + "\n" + json.dumps({"question": "too short"}) + "\n")
    two = tmp_path / "sums.jsonl.gz"
    two.write_bytes(gzip.compress(json.dumps({"text": text_of_words(400, 20)}).encode()))
    return [one, two]


def test_benchmark_rows_of_any_columns(tmp_path: Path) -> None:
    items = read_benchmarks(benchmarks(tmp_path))
    assert [(i.benchmark, i.number) for i in items] == [("quiz", 1), ("quiz", 2), ("sums", 1)]
    assert items[0].text == f"{text_of_words(0, 20)}\nyes\nno"
    assert Detector(items).too_short.tolist() == [False, True, False]


@pytest.mark.parametrize("num_workers", [1, 2])
def test_command_splits_rows_and_counts_benchmarks(tmp_path: Path, num_workers: int) -> None:
    leak, other = text_of_words(0, 20), text_of_words(400, 20)
    both = f"{leak} {text_of_words(800, 20)} {other}"
    clean = [text_of_words(start, 80) for start in range(100, 300, 80)]
    source = rows(tmp_path / "rows.jsonl", clean[0], leak, clean[1], both, clean[2])
    partial = f"{text_of_words(500, 60)} {text_of_words(400, 8)} {text_of_words(600, 60)}"
    with source.open("ab") as stream:
        stream.write(b'{"text": "\xff"}\n{"text": "a\\u0000b"}\n{"text"\n{"text": "\\ud800"}\n[]\n')
        stream.write(json.dumps({"text": partial}).encode() + b"\n")
    detector = Detector(read_benchmarks(benchmarks(tmp_path)), thresholds=Thresholds(0.1, 0.2))
    out = tmp_path / "out"
    screened, tally = decontaminate([source], detector, out, num_workers=num_workers)
    lines = source.read_bytes().splitlines()
    assert (out / "rows.jsonl").read_bytes().splitlines() == [lines[i] for i in (0, 2, 4, 10)]
    held = read(out / "quarantine.rejects")
    assert [row["line"] for row in held] == [2, 4, 6, 7, 8, 9, 10]
    assert [row["reason"] for row in held][:4] == [
        *["13-gram match"] * 2,
        "invalid UTF-8 at byte 10",
        "NUL at character 1",
    ]
    assert held[0]["row"].encode() == lines[1]
    assert {match["benchmark"] for match in held[1]["matches"]} == {"quiz", "sums"}
    assert held[0]["matches"][0]["ngrams"][0] == text_of_words(0, 13)
    assert screened.num_kept == 4 and screened.rejected == {"13-gram match": 2, "bad row": 5}
    report = json.loads((out / "decontaminate.report").read_text())
    quiz, sums = report["benchmarks"]["quiz"], report["benchmarks"]["sums"]
    assert (quiz["rows_13gram"], quiz["items_found"], quiz["num_too_short"]) == (2, [1], 1)
    assert (sums["rows_13gram"], sums["rows_partial"], sums["num_items"]) == (1, 1, 1)
    assert report["num_partial"] == tally.num_partial == 1


def test_chat_rows_are_read_in_all_their_turns(tmp_path: Path) -> None:
    leak = text_of_words(0, 20)
    chat = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": leak}]
    source = tmp_path / "chat.jsonl"
    listed = [{"messages": chat}, {"prompt": "x", "chosen": chat[1:], "rejected": "no"}]
    source.write_text("".join(json.dumps(row) + "\n" for row in listed))
    detector = Detector(read_benchmarks(benchmarks(tmp_path)))
    screened, _ = decontaminate([source], detector, tmp_path / "out")
    assert screened.rejected == {"13-gram match": 2}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "has no items"),
        (b"[1]\n", "line 1: expected a JSON object"),
        (b'{"id": "7"}\n', "line 1: no text"),
        (b'{"q": "\xff"}\n', "line 1: invalid UTF-8 at byte 7"),
    ],
)
def test_bad_benchmark_is_one_clear_line(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "bench.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_benchmarks([path])


def test_two_benchmarks_of_one_name(tmp_path: Path) -> None:
    for directory in ("a", "b"):
        (tmp_path / directory).mkdir()
    paths = [rows(tmp_path / directory / "quiz.jsonl", "x") for directory in ("a", "b")]
    assert [item.benchmark for item in read_benchmarks(paths)] == ["a/quiz", "b/quiz"]


def test_bad_settings() -> None:
    with pytest.raises(DataError, match="'fuzzy'; expected one of robust, paper"):
        Detector([], "fuzzy")
    with pytest.raises(DataError, match="0 <= info <= contaminated <= 1"):
        Thresholds(0.5, 0.2)


def test_no_items_find_nothing() -> None:
    assert Detector([]).check(TRAIN).finding is Finding.CLEAN
    assert not np.any(Detector([item("a")]).long_grams(TRAIN))
