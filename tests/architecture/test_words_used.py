"""Prose uses plain technical English: the words below are written in no other way.

Searched are docstrings, comments and other strings of Python files, and all of the text of the
other files. Backquoted names, and fenced code and generated blocks of
markdown, are skipped.
"""

import ast
import io
import re
import subprocess
import tokenize
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]

WORDS = {
    r"learnt": "learned; of labels: in the loss",
    r"mend(s|ed|ing)?": "fix, repair",
    r"aloud": "logged, reported",
    r"(go|goes|going|went|gone) on": "continue, resume",
    r"beside(?!:)": "next to, with, in addition to",
    r"anew": "again",
    r"whoever": "name the code or the user",
    r"nobody": "no process, no user; or the passive",
    r"of the draws": "of the sampling, sampling seed",
    r"leavings": "leftovers",
    r"paper rank": "fake rank",
    r"so (many|long)(?! as\b)": "this many, this long; the number of",
    r"to the bit": "bit-identical",
    r"(a|the|this|each|every|newest|later|earlier|last|first|no) roll back|roll backs": "rollback",
    r"(is|are|was|be) meant": "is intended",
    r"(lie|lies|lay) (in|beside|behind|there|where|at|outside|inside|below|under|within|elsewhere"
    r"|between|apart|now|aside)": "is, are; spaced",
    r"(stand|stands|stood) (in|on|there|where|beside|behind|at|alone|under|elsewhere|between|above"
    r"|below|still|side)": "is, are",
    r"(know|knows|knowing) nothing of": "is independent of",
    r"has been fed": "was trained on",
    r"what (became|becomes) of": "the outcome of, how it is handled",
    r"by the way round": "around",
    r"times? of change": "modification time",
    r"in the words of": "in the format of",
    r"it is told": "it receives, it is notified",
    r"bury|buries": "reap, remove",
}
"""Pattern -> what to write instead."""

_FOLDERS = ("phi4", "kernels", "csrc", "tools", "examples", "docs")
_PAGES = ("README.md", "CONTRIBUTING.md", "BENCHMARKS.md", "Makefile")
_SUFFIXES = (".py", ".md", ".cpp", ".cu", ".cuh", ".h", ".sh", ".toml", ".sbatch")
_BREAK = r"[\s#/*]+"  # a phrase may continue on the next line, of comments too
_PATTERN = re.compile(r"\b(?:" + "|".join(WORDS).replace(" ", _BREAK) + r")\b")

_NO_PROSE = re.compile(r"```.*?```|<!-- [\w ]+: begin.*?: end -->", re.DOTALL)


def _prose_of_python(source: str) -> list[tuple[int, str]]:
    """Line and text of every string with a space in it, and of every comment."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value:
            found.append((node.lineno, node.value))
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            found.append((token.start[0], token.string))
    return found


def _prose(path: str, source: str) -> list[tuple[int, str]]:
    if path.endswith(".py"):
        return _prose_of_python(source)
    if path.endswith(".md"):
        source = _NO_PROSE.sub(lambda m: re.sub(r"[^\n]", "", m[0]), source)
    return [(1, source)]


def words_found(path: str, source: str) -> list[str]:
    """`path:line: word; write ...` for every listed word in the prose of a file."""
    if not _PATTERN.search(source.lower()):
        return []
    lines = []
    for begin, text in _prose(path, source):
        text = re.sub(r"`[^`\n]*`", lambda m: " " * len(m[0]), text.lower())
        for match in _PATTERN.finditer(text):
            line = begin + text.count("\n", 0, match.start())
            word = re.sub(_BREAK, " ", match[0])
            instead = next(new for old, new in WORDS.items() if re.fullmatch(old, word))
            lines.append(f"{path}:{line}: {word!r}; write: {instead}")
    return lines


def _searched() -> list[Path]:
    git = ["git", "-c", "safe.directory=*", "ls-files", "-z"]
    names = subprocess.check_output(git, cwd=REPOSITORY, text=True).split("\0")
    return [
        path
        for path in map(Path, filter(None, names))
        if path.as_posix() in _PAGES or (path.parts[0] in _FOLDERS and path.suffix in _SUFFIXES)
    ]


def test_prose_uses_plain_words() -> None:
    found = []
    for path in _searched():
        found += words_found(path.as_posix(), (REPOSITORY / path).read_text())
    assert not found, "\n" + "\n".join(found)


@pytest.mark.parametrize(
    "text",
    [
        "A run that goes on after a kill.",
        "Labels that are learnt.",
        "The files lie where they were.",
        "Kept beside the shards.",
        "After a roll back, or two roll backs.",
        "Steps with the same bits, to the bit.",
        "A rank that is silent for so long.",
    ],
)
def test_private_words_are_found(text: str) -> None:
    for path, source in [
        ("a.py", f'"""{text}"""\n'),
        ("a.py", f"x = 1  # {text}\n"),
        ("a.py", f'raise ValueError(f"{{x}} {text}")\n'),
        ("a.md", f"# Title\n\n{text}\n"),
        ("a.cu", f"// {text}\n"),
    ]:
        assert words_found(path, source), (path, text)


@pytest.mark.parametrize(
    "text",
    [
        "The optimizer continues from the ongoing step.",
        "As long as it is so, and so on.",
        "Run `phi4 go on beside` again.",
        "Besides this, recommend it.",
    ],
)
def test_ordinary_words_are_not(text: str) -> None:
    assert not words_found("a.py", f'"""{text}"""\n')
