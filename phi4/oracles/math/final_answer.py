"""Extract the final answer from a text, and normalise its spelling.

The last statement counts, because a model corrects itself later in the text.
"""

import re
from collections.abc import Iterator

MAX_CHARACTERS = 200
"""Longer final answers are only compared for equality, because graders blow up on them."""

_BOX = re.compile(r"\\(?:boxed|fbox)\b\s*")
_STATED = re.compile(
    r"(?:####|\banswer\b\s*(?:\*\*)?\s*(?:is|:|=)\s*:?)\s*(?:\*\*)?[^\S\n]*(?=\S)", re.IGNORECASE
)
_SENTENCE_END = re.compile(r"\n|\.\s")
_SPELLINGS = (
    ("−", "-"), ("×", r"\times "), ("·", r"\cdot "), ("÷", r"\div "),
    ("°", r"^\circ"), ("％", "%"), ("²", "^2"), ("³", "^3"), ("π", r"\pi "), ("∞", r"\infty "),
    ("≤", r"\le "), ("≥", r"\ge "), ("√", r"\sqrt"), ("\u00a0", " "), ("\u202f", " "),
    (r"\dfrac", r"\frac"), (r"\tfrac", r"\frac"), (r"\cfrac", r"\frac"), (r"\%", "%"),
    ("{,}", ","), (r"\displaystyle", ""), (r"\quad", " "), ("~", " "), ("**", ""),
    (r"\leq", r"\le"), (r"\geq", r"\ge"), (r"\lbrace", r"\{"),
    (r"\rbrace", r"\}"), (r"\mathrm", r"\text"), (r"\textrm", r"\text"), (r"\textbf", r"\text"),
    (r"\mathbf", r"\text"), (r"\mbox", r"\text"),
)  # fmt: skip
_SPACING = re.compile(r"(?<!\\)\\[,;:! ]")
_DELIMITERS = re.compile(r"(?<!\\)\\[()\[\]]")
"""Not after a backslash: two of them end the row of a matrix."""
_SIZES = re.compile(r"\\(?:left|right|big|Big|bigg|Bigg)[lrm]?(?![a-zA-Z])\s*")
_TIGHT = re.compile(r"\s*([^\w\s\\.%])\s*")


def final_answer(text: str) -> str | None:
    """Return what a text states last: its last complete box, else the text after the last "answer
    is", else its last line.

    None if it states nothing.
    """
    boxes = list(_boxes(text))
    if boxes:
        return boxes[-1].strip() or None
    # Another sentence may follow on the same line.
    stated = [_SENTENCE_END.split(text[found.end() :])[0] for found in _STATED.finditer(text)]
    lines = [line for line in text.split("\n") if line.strip()]
    last = stated[-1] if stated else lines[-1] if lines else ""
    return last.strip() or None


def spelled(text: str) -> str:
    """Normalise a final answer's LaTeX: no delimiters, sizes or spacing commands."""
    for other, ours in _SPELLINGS:
        text = text.replace(other, ours)
    text = _SIZES.sub("", _DELIMITERS.sub("", _SPACING.sub(" ", text)))
    # With an even number of dollars each pair is a delimiter; a single one is money.
    bare = re.findall(r"(?<!\\)\$", text)
    if len(bare) % 2 == 0:
        text = re.sub(r"(?<!\\)\$", "", text)
    text = text.replace(r"\$", "$")
    text = re.sub(r"[.,;:]+\s*$", "", text.strip()) if not text.strip().endswith("...") else text
    return re.sub(r"\s+", " ", text).strip()


def tight(text: str) -> str:
    """Remove meaningless spaces from a normalised answer; that of `1 1/2` stays."""
    return _TIGHT.sub(r"\1", text)


def _boxes(text: str) -> Iterator[str]:
    for box in _BOX.finditer(text):
        rest = text[box.end() :]
        if rest.startswith("{"):
            content = _braced(rest)
            if content is not None:
                yield content
        elif plain := re.match(r"[^\s$\\]+", rest):
            yield plain[0]


def _braced(text: str) -> str | None:
    """Return the text between the opening brace and its partner; None if there is none."""
    depth = 0
    for found in re.finditer(r"\\.|[{}]", text, re.DOTALL):
        depth += {"{": 1, "}": -1}.get(found[0], 0)
        if depth == 0:
            return text[1 : found.start()]
    return None
