"""The ways in which the self-test inserts benchmark items into training text."""

import html
import random
import re
from collections.abc import Callable

from phi4.data.screens.decontaminate.self_test.items import Question

_LINE_WORDS = 8
_EMBEDDING_PASSAGES = 6
_NUMBER = re.compile(
    r"(?<![\w.,])\d{1,3}(?:,\d{3})+(?![\w,])(?!\.\d)|(?<![\w.,])\d+(?:\.\d+)?(?![\w,])(?!\.\d)"
)
_WORD_MARK = re.compile(r"(?<!\d)[.,;:!?'\"()-]|[.,;:!?'\"()-](?!\d)")
_HYPHENATED_LETTERS = 5
_INSIDE_WORD = re.compile(r"(?<=[^\W\d_]{3})(?=[^\W\d_]{3})")
_FULL_WIDTH = str.maketrans("0123456789", "０１２３４５６７８９")

Plant = Callable[[Question, tuple[str, ...], random.Random], str | None]
"""Takes a question, clean passages and a generator; returns a training text, or None if not
applicable."""


def verbatim(question: Question, passages: tuple[str, ...], generator: random.Random) -> str | None:
    """Unchanged, as a paragraph between two others."""
    return _between(question.full, passages, generator)


def rewrapped(
    question: Question, passages: tuple[str, ...], generator: random.Random
) -> str | None:
    """Eight words per line."""
    words = question.full.split()
    lines = (words[start : start + _LINE_WORDS] for start in range(0, len(words), _LINE_WORDS))
    return _between("\n".join(map(" ".join, lines)), passages, generator)


def embedded(question: Question, passages: tuple[str, ...], generator: random.Random) -> str | None:
    """In the middle of a sentence of a longer text."""
    words = " ".join(generator.choices(passages, k=_EMBEDDING_PASSAGES)).split(" ")
    cut = generator.randrange(len(words) // 4, 3 * len(words) // 4)
    return " ".join([*words[:cut], question.full, *words[cut:]])


def options_shuffled(
    question: Question, passages: tuple[str, ...], generator: random.Random
) -> str | None:
    """Return the same options under other letters; None for items without options."""
    options = list(question.options)
    if len(set(options)) < 2:
        return None
    while tuple(options) == question.options:
        generator.shuffle(options)
    shuffled = Question(question.kind, question.text, tuple(options))
    return _between(shuffled.full, passages, generator)


def options_left_out(
    question: Question, passages: tuple[str, ...], generator: random.Random
) -> str | None:
    """Return the question alone; None for items without options."""
    return _between(question.text, passages, generator) if question.options else None


def case_and_punctuation(
    question: Question, passages: tuple[str, ...], generator: random.Random
) -> str | None:
    """Changed case, and punctuation exchanged or removed before a space."""
    text = generator.choice([str.upper, str.lower, str.title])(question.full)

    def changed(match: re.Match[str]) -> str:
        follows = text[match.end() : match.end() + 1]
        return generator.choice([" ", " - ", "\u2026", "" if follows in ("", " ", "\n") else "/"])

    return _between(_WORD_MARK.sub(changed, text), passages, generator)


def numbers_reformatted(
    question: Question, passages: tuple[str, ...], generator: random.Random
) -> str | None:
    """Other thousands separators, zeros after the point, full-width digits; None without
    numbers."""
    text = question.full
    if not _NUMBER.search(text):
        return None

    def changed(match: re.Match[str]) -> str:
        number = match[0].replace(",", "")
        whole, point, fraction = number.partition(".")
        forms = [number.translate(_FULL_WIDTH), number + ("0" if point else ".0")]
        if len(whole) > 3:
            mark = generator.choice([",", "\u202f", "'"])
            forms += [f"{int(whole):,}".replace(",", mark) + point + fraction, number]
        return generator.choice([form for form in forms if form != match[0]])

    return _between(_NUMBER.sub(changed, text), passages, generator)


def html_entities(
    question: Question, passages: tuple[str, ...], generator: random.Random
) -> str | None:
    """Punctuation as entities, and some spaces as `&nbsp;`."""
    words = html.escape(question.full).split(" ")
    text = words[0]
    for word in words[1:]:
        text += generator.choice([" ", "&nbsp;", "&#160;"]) + word
    return _between(text, passages, generator)


def hyphenated(
    question: Question, passages: tuple[str, ...], generator: random.Random
) -> str | None:
    """Eight words per line, the last one of each hyphenated if it is long enough."""
    words = question.full.split()
    text = ""
    for number, word in enumerate(words, start=1):
        if number % _LINE_WORDS:
            text += word + " "
        elif word.isalpha() and len(word) >= _HYPHENATED_LETTERS:
            cut = generator.randrange(2, len(word) - 1)
            text += f"{word[:cut]}-\n{word[cut:]} "
        else:
            text += word + "\n"
    return _between(text, passages, generator)


def zero_width(
    question: Question, passages: tuple[str, ...], generator: random.Random
) -> str | None:
    """Zero-width spaces for spaces, soft hyphens inside words."""
    text = question.full.replace(" ", "\u200b")
    return _between(_INSIDE_WORD.sub("\u00ad", text), passages, generator)


PLANTS: dict[str, Plant] = {
    "verbatim": verbatim,
    "re-wrapped": rewrapped,
    "embedded": embedded,
    "options shuffled": options_shuffled,
    "options left out": options_left_out,
    "case, punctuation": case_and_punctuation,
    "numbers": numbers_reformatted,
    "HTML entities": html_entities,
    "hyphenated lines": hyphenated,
    "zero-width": zero_width,
}


def _between(text: str, passages: tuple[str, ...], generator: random.Random) -> str:
    before, after = generator.choices(passages, k=2)
    return f"{before}\n\n{text}\n\n{after}"
