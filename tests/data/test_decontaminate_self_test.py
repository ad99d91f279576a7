"""The floors of the detector, on items and clean text that chose no threshold."""

import html
import random
from collections import Counter

import pytest

from phi4.data.screens.decontaminate.rule import DEFAULT_THRESHOLDS
from phi4.data.screens.decontaminate.self_test.items import (
    Material,
    Question,
    SelfTestText,
    self_test_text,
)
from phi4.data.screens.decontaminate.self_test.leaks import CleanText
from phi4.data.screens.decontaminate.self_test.plants import PLANTS
from phi4.data.screens.decontaminate.self_test.run import (
    Measured,
    choose_thresholds,
    measure,
    report,
    run_self_test,
)

FLOORS = {
    "verbatim": 0.99,
    "re-wrapped": 0.95,
    "embedded": 0.95,
    "options shuffled": 0.95,
    "case, punctuation": 0.95,
    "numbers": 0.95,
    "HTML entities": 0.95,
    "hyphenated lines": 0.95,
    "zero-width": 0.95,
}


@pytest.fixture(scope="module")
def text() -> SelfTestText:
    return self_test_text()


@pytest.fixture(scope="module")
def robust(text: SelfTestText) -> Measured:
    every_other = Material(text.measuring.questions[::2], text.measuring.clean)
    return measure(every_other, text.reference, "robust", DEFAULT_THRESHOLDS["robust"])


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "floor"), FLOORS.items())
def test_robust_recall_is_above_its_floor(robust: Measured, kind: str, floor: float) -> None:
    # How much documentation there is depends on the interpreter; a hundred items measure a floor.
    assert robust.planted[kind] >= 100
    assert robust.recall(kind) >= floor


@pytest.mark.slow
def test_robust_false_alarms_on_the_documentation(robust: Measured) -> None:
    # Of fewer texts a single alarm would be above the bound.
    assert robust.num_clean >= 1 / 0.005
    assert robust.false_alarms <= 0.005


def test_halves_are_disjoint(text: SelfTestText) -> None:
    used = CleanText([*text.choosing.clean, *text.reference])
    assert not any(used.holds(passage) for passage in text.measuring.clean)
    choosing = CleanText(question.text for question in text.choosing.questions)
    assert not any(choosing.holds(question.text) for question in text.measuring.questions)
    kinds = Counter(question.kind for question in text.measuring.questions)
    assert min(kinds[kind] for kind in ("definition", "gap", "ending", "problem")) >= 25


@pytest.mark.slow
def test_choosing_half_asks_for_the_thresholds_in_use(text: SelfTestText) -> None:
    half = Material(text.choosing.questions[::5], text.choosing.clean)
    chosen = choose_thresholds(half, text.reference, "robust")
    assert abs(chosen.contaminated - DEFAULT_THRESHOLDS["robust"].contaminated) <= 0.1


def test_paper_loses_what_is_re_wrapped_and_the_report_shows_it(text: SelfTestText) -> None:
    few = SelfTestText(
        Material(text.choosing.questions[::30], text.choosing.clean[::4]),
        Material(text.measuring.questions[::30], text.measuring.clean[::4]),
        text.reference,
    )
    results = [run_self_test(few, name) for name in ("robust", "paper")]
    robust = results[0].measuring
    assert all(robust.recall(kind) >= floor for kind, floor in FLOORS.items()), robust
    paper = results[1].measuring
    assert paper.recall("verbatim") >= 0.99
    assert paper.recall("re-wrapped") < 0.5
    assert paper.recall("case, punctuation") < 0.95
    shown = report(results)
    lines = shown[shown.index("measuring half") :].splitlines()
    for kind in PLANTS:
        line = next(line for line in lines if line.strip().startswith(kind))
        recalls = [f"{result.measuring.recall(kind):.4f}" for result in results]
        assert line.split()[-4:][1::2] == recalls
    assert "false alarms" in shown and "measuring half" in shown and "choosing half" in shown


def test_an_item_is_found_only_when_it_is_named() -> None:
    words = [f"word{i}" for i in range(40)]
    first = Question("quiz", " ".join(words), ())
    # The 13-gram rule fires on the first item; the second shares nothing with its own plant.
    second = Question("quiz", "one two three four five six", ())
    material = Material((first, second), ("nothing here",) * 4)
    measured = measure(material, (), "robust", DEFAULT_THRESHOLDS["robust"])
    assert measured.found["verbatim"] == 1 and measured.planted["verbatim"] == 2


ASKED = "What is 1234 + 5.5, Ann? Say thousands & it."
QUESTION = Question("quiz", ASKED, ("one", "two 99", "three", "four"))


@pytest.mark.parametrize("kind", PLANTS)
def test_plants_change_what_they_name_and_nothing_else(kind: str) -> None:
    planted = PLANTS[kind](QUESTION, ("<clean>",) * 3, random.Random(3))
    plain = f"{QUESTION.text}\n{QUESTION.listed}"
    kept = {
        "verbatim": lambda text: text,
        "embedded": lambda text: text,
        "re-wrapped": lambda text: text.split(),
        "options shuffled": lambda text: (sorted(text.split()), text.splitlines()[0]),
        "options left out": lambda text: text.splitlines()[0],
        "case, punctuation": lambda text: [c for c in text.lower() if c.isalnum()],
        "numbers": lambda text: [c for c in text if c.isalpha()],
        "HTML entities": lambda text: html.unescape(text).replace("\u00a0", " "),
        "hyphenated lines": lambda text: text.replace("-\n", "").split(),
        "zero-width": lambda text: text.replace("\u200b", " ").replace("\u00ad", ""),
    }[kind]
    if kind == "embedded":
        assert plain in planted
        return
    before, body, after = planted.split("\n\n")
    assert before == after == "<clean>"
    assert kept(body) == kept(plain)
    assert (body == plain) == (kind == "verbatim")
    if kind == "re-wrapped":
        assert all(len(line.split()) == 8 for line in body.splitlines()[:-1])
    sign = {"HTML entities": "&amp;", "hyphenated lines": "-\n", "zero-width": "\u00ad"}.get(
        kind, ""
    )
    assert sign in body


def test_plants_that_make_no_sense() -> None:
    bare = Question("quiz", "no number and no option", ())
    generator = random.Random(0)
    assert PLANTS["options shuffled"](bare, ("x",), generator) is None
    assert PLANTS["numbers"](bare, ("x",), generator) is None


def test_clean_text_knows_its_passages_in_any_format() -> None:
    passage = "The quick brown fox jumps over the lazy dog and then runs far away from the bear."
    clean = CleanText([passage, "Another passage that is about something else entirely, and long."])
    assert clean.holds(passage.upper().replace(" ", "\n"))
    assert clean.holds(passage[:60] + " but then it was never there at all")
    assert not clean.holds("Entirely different words were chosen by the author of this sentence.")
    assert not clean.holds("The quick brown fox")
