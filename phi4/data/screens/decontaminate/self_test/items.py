"""Benchmark-like items and clean text from CPython's documentation, for the self-test.

Items resemble those of public benchmarks: doctests as output prediction, docstrings and the
language reference as multiple choice, word problems. They come from other modules and topics than
the clean text, and an item that also occurs there is dropped, because flagging that text would be
correct. Phrases that the documentation repeats stay in both; they cause the false alarms.
"""

import hashlib
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from phi4.data.demo.corpora import standard_library_corpus
from phi4.data.screens.decontaminate.benchmark import Item
from phi4.data.screens.decontaminate.self_test.leaks import CleanText
from phi4.errors import DataError

_PASSAGE_WORDS = 60
_NUM_PROBLEMS = 60
_ITEM_WORDS = 8
_NAME = re.compile(r"[A-Za-z_][\w.]+")
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z])")

# Shorter than a 7-gram: an item must be found by its own text.
_DEFINITION_FORMS = (
    "Which name has this description? {}",
    "{} Which name fits this description?",
    "Name the object documented as follows.\n{}",
)
_OUTPUT_FORMS = (
    "What does Python print next?\n{}",
    "Consider this session.\n{}\nWhich output follows?",
    "{}\nWhat is shown next?",
)
_GAP_FORMS = (
    "Which word completes the sentence? {}",
    "{}\nSelect the word for the gap.",
    "One word is missing: {} Which one?",
)
_PROBLEMS = (
    "{name} harvests {big} {things} in {month} and sells them in boxes of {small}. Each box brings "
    "{price} dollars. How much does {name} earn when {other} boxes are given to neighbours?",
    "A workshop makes {big} {things} a year. After a repair the number grows by {price} percent. "
    "How many {things} does {name} count in the first {small} months of the new year?",
    "On her way to {town}, {name} passes {small} bridges, each {price} kilometres after the one "
    "before. The whole way is {big} metres long. How far is it from the last bridge to {town}?",
    "{name} has {big} {things} and wants to share them between {small} friends so that everyone "
    "gets the same number. How many are left over if {other} of them are broken?",
    "The price of {things} fell from {price} to half of that within {small} weeks. If {name} had "
    "bought {big} of them in {month}, how much would have been saved by waiting?",
    "A train with {other} seats leaves {town} every {small} minutes. In {month} it carried {big} "
    "passengers, {name} among them. What share of its seats was taken on a day of {price} trips?",
)
_SLOTS = {
    "name": ("Amira", "Jonas", "Mei", "Oluwaseun", "Priya", "Tomasz", "Lucia", "Henrik", "Noor"),
    "things": ("apples", "chairs", "lanterns", "postcards", "bricks", "kites", "melons", "candles"),
    "month": ("January", "March", "May", "July", "September", "October", "December"),
    "town": ("Lund", "Bergamo", "Aveiro", "Kisumu", "Nagano", "Olinda", "Szeged", "Turku"),
}


@dataclass(frozen=True)
class Question:
    """An item with its options separate, so that they can be shuffled."""

    kind: str
    text: str
    options: tuple[str, ...]

    def item(self, number: int) -> Item:
        """Return the item as a benchmark row."""
        return Item(self.kind, number, self.full)

    @property
    def full(self) -> str:
        """The question and its options."""
        return f"{self.text}\n{self.listed}" if self.options else self.text

    @property
    def listed(self) -> str:
        """The options with their letters."""
        lines = zip("ABCD", self.options, strict=True)
        return "\n".join(f"{letter}. {option}" for letter, option in lines)


@dataclass(frozen=True)
class Material:
    """Data of one half of the self-test.

    Attributes:
        questions: the benchmark items.
        clean: texts that contain none of them.
    """

    questions: tuple[Question, ...]
    clean: tuple[str, ...]


@dataclass(frozen=True)
class SelfTestText:
    """Disjoint texts for choosing thresholds, for measuring, and for learning common phrases."""

    choosing: Material
    measuring: Material
    reference: tuple[str, ...]


def self_test_text(
    clean: Sequence[str] = (), items: Sequence[Item] = (), seed: int = 0
) -> SelfTestText:
    """Make items and clean text from this Python's docstrings and language reference.

    Args:
        clean: texts to measure on, instead of the documentation's second half.
        items: benchmark items to insert instead of generated ones, alternating between the halves.
        seed: seed of the choice of options, gaps and halves.

    Raises:
        DataError: this Python lacks its documentation, or one half has no text left.
    """
    sides = _sides()
    if clean:
        sides["measure"] = list(clean)
    cut = {name: tuple(passages(sides[name])) for name in ("common", "choose", "measure")}
    # Topics of the reference quote each other: a text used to choose the thresholds must not be
    # measured.
    used = CleanText([*cut["common"], *cut["choose"]])
    cut["measure"] = tuple(text for text in cut["measure"] if not used.holds(text))
    known = CleanText(text for texts in cut.values() for text in texts)
    generator = random.Random(seed)
    halves = [
        [
            question
            for question in (
                (Question(item.benchmark, item.text, ()) for item in items[half::2])
                if items
                else _questions(sides["items"][half::2], _PROBLEMS[half::2], generator)
            )
            if len(question.text.split()) >= _ITEM_WORDS
            and not any(known.holds(part) for part in (question.text, *question.options))
        ]
        for half in (0, 1)
    ]
    choosing = CleanText(question.text for question in halves[0])
    halves[1] = [question for question in halves[1] if not choosing.holds(question.text)]
    if not (all(halves) and cut["measure"]):
        raise DataError(
            f"{len(halves[0])} and {len(halves[1])} items and {len(cut['measure'])} clean passages "
            "remain after dropping short items and texts that occur in both halves; give more of "
            "them"
        )
    return SelfTestText(
        choosing=Material(tuple(halves[0]), cut["choose"]),
        measuring=Material(tuple(halves[1]), cut["measure"]),
        reference=cut["common"],
    )


def _sides() -> dict[str, list[str]]:
    """Split this Python's prose into four disjoint parts."""
    corpus = standard_library_corpus()
    sides: dict[str, list[str]] = {name: [] for name in ("items", "common", "choose", "measure")}
    for text in [*corpus["prose"], *corpus["prose_held_out"]]:
        place = int(hashlib.sha256(b"items" + text.encode()).hexdigest()[:8], 16) % 10
        sides["items" if place < 3 else ("common", "choose", "measure")[place % 3]].append(text)
    return sides


def passages(texts: Iterable[str]) -> Iterator[str]:
    """Cut texts at blank lines into pieces of at least about sixty words."""
    for text in texts:
        piece: list[str] = []
        for paragraph in text.split("\n\n"):
            piece.append(paragraph)
            if sum(len(part.split()) for part in piece) >= _PASSAGE_WORDS:
                yield "\n\n".join(piece)
                piece = []
        if piece:
            yield "\n\n".join(piece)


def _questions(
    texts: list[str], problems: Sequence[str], generator: random.Random
) -> Iterator[Question]:
    paragraphs = [part for text in texts for part in text.split("\n\n") if part.strip()]
    named = [
        (name, _first_sentence(text))
        for name, text in pairwise(paragraphs)
        if _NAME.fullmatch(name) and not _NAME.fullmatch(text)
    ]
    names = [name for name, _ in named]
    yield from (_definition(name, text, names, generator) for name, text in named)
    sentences = [
        sentence
        for paragraph in paragraphs
        if ">>>" not in paragraph
        for sentence in _SENTENCE_END.split(" ".join(paragraph.split()))
        if 14 <= len(sentence.split()) <= 60
    ]
    sentences = list(dict.fromkeys(sentences))
    sentences = generator.sample(sentences, min(len(sentences), len(named)))
    words = sorted({word for text in sentences for word in text.split() if word.isalpha()})
    for index, sentence in enumerate(sentences):
        if index % 2:
            yield _ending(sentence, sentences, generator)
        else:
            yield _gap(sentence, words, generator)
    found = (session for paragraph in paragraphs if (session := _session(paragraph)))
    sessions = list(dict.fromkeys(found))
    answers = [answer for _, answer in sessions]
    yield from (_output(session, answer, answers, generator) for session, answer in sessions)
    yield from (_problem(generator.choice(problems), generator) for _ in range(_NUM_PROBLEMS))


def _definition(name: str, text: str, names: list[str], generator: random.Random) -> Question:
    form = generator.choice(_DEFINITION_FORMS)
    return Question("definition", form.format(text), _options(name, names, generator))


def _gap(sentence: str, words: list[str], generator: random.Random) -> Question:
    candidates = [word for word in sentence.split() if word.isalpha() and len(word) > 3]
    word = generator.choice(candidates or ["the"])
    text = re.sub(rf"\b{word}\b", "____", sentence, count=1)
    form = generator.choice(_GAP_FORMS)
    return Question("gap", form.format(text), _options(word, words, generator))


def _ending(sentence: str, sentences: list[str], generator: random.Random) -> Question:
    words = sentence.split()
    cut = len(words) // 2
    others = [" ".join(other.split()[-cut:]) for other in generator.sample(sentences, 3)]
    options = _options(" ".join(words[cut:]), others, generator)
    return Question("ending", " ".join(words[:cut]) + " ...", options)


def _session(paragraph: str) -> tuple[str, str] | None:
    """Return the lines of a doctest up to its last input, and that input's output."""
    lines = paragraph.splitlines()
    inputs = [i for i, line in enumerate(lines) if line.lstrip().startswith((">>>", "..."))]
    first = next((i for i, line in enumerate(lines) if line.lstrip().startswith(">>>")), None)
    if first is None or inputs[-1] + 1 == len(lines):
        return None
    return "\n".join(lines[first : inputs[-1] + 1]), lines[inputs[-1] + 1].strip()


def _output(session: str, answer: str, answers: list[str], generator: random.Random) -> Question:
    form = generator.choice(_OUTPUT_FORMS)
    return Question("output", form.format(session), _options(answer, answers, generator))


def _problem(form: str, generator: random.Random) -> Question:
    big = generator.randint(1_000, 99_999)
    slots: dict[str, object] = {name: generator.choice(words) for name, words in _SLOTS.items()}
    slots["big"] = generator.choice([f"{big}", f"{big:,}"])
    slots["small"], slots["other"] = generator.randint(3, 30), generator.randint(31, 900)
    slots["price"] = f"{generator.randint(11, 99)}.{generator.randint(1, 9)}"
    text = form.format(**slots)
    return Question("problem", text, ())


def _options(right: str, pool: list[str], generator: random.Random) -> tuple[str, ...]:
    others = [text for text in dict.fromkeys(generator.sample(pool, min(len(pool), 12)))]
    options = [right, *[text for text in others if text != right][:3]]
    options += ["none of these"] * (4 - len(options))
    generator.shuffle(options)
    return tuple(options)


def _first_sentence(text: str) -> str:
    return _SENTENCE_END.split(" ".join(text.split()), maxsplit=1)[0]
