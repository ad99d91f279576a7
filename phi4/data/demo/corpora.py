"""Corpora made from CPython's standard library.

Sources are the code; docstrings and pydoc's language reference as prose; and functions turned into
answers to their own descriptions as synthetic exercises. The corpus is enough to show that a model
learns, and needs no download; it supports no claims about capability. Everything made from one
module is on one side of the training / held-out split, so no held-out text appears in training in
another form.
"""

import ast
import hashlib
import importlib.util
import sysconfig
import textwrap
import warnings
from collections.abc import Iterator
from pathlib import Path

from phi4.errors import DataError

# Tests, third-party packages, and tables that are neither code nor prose.
_EXCLUDED_PARTS = frozenset(
    {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    | {"encodings", "lib2to3", "pydoc_data", "turtledemo"}
)
_HELD_OUT_PERCENT = 5
_TOPICS_HELD_OUT_PERCENT = 12  # there are few


PHI4_SHARES = {"synthetic": 0.40, "code": 0.20, "web": 0.30, "acquired": 0.10}
"""Weights as in the report's Table 5; web and web rewrites are one source here."""


def standard_library_corpus(max_code_bytes: int = 5_000_000) -> dict[str, list[str]]:
    """Return documents of `code`, `prose`, `code_held_out` and `prose_held_out`.

    The order is that of the content hashes, which shuffles the documents and makes the cut at
    `max_code_bytes` a fair sample. A text appears only once in all four.

    Raises:
        DataError: this Python lacks the sources or topics of its standard library.
    """
    corpus = phi4_corpus(max_code_bytes)
    for side in ("", "_held_out"):
        corpus["prose" + side] = sorted(
            corpus.pop("web" + side) + corpus.pop("acquired" + side), key=_digest
        )
        del corpus["synthetic" + side]
    return corpus


def phi4_corpus(max_code_bytes: int = 5_000_000) -> dict[str, list[str]]:
    """Return the same documents under the names of Phi-4's sources, each with its `_held_out` side.

    `code` is modules, `web` their docstrings, `acquired` the language reference, `synthetic`
    exercises whose answers are functions of the code: the report's instruction reversal. A text
    appears only once in all of them.

    Source: technical report, section 2.2.

    Raises:
        DataError: as `standard_library_corpus`.
    """
    corpus: dict[str, list[str]] = {
        name + side: [] for name in PHI4_SHARES for side in ("", "_held_out")
    }
    seen: set[str] = set()
    code_bytes = 0

    def add(kind: str, side: str, text: str) -> None:
        digest = _digest(text)
        if text.strip() and digest not in seen:
            seen.add(digest)
            corpus[kind + side].append(text)

    for digest, text in sorted((_digest(text), text) for text in _sources()):
        module = _parsed(text)
        if module is None:
            continue
        side = _side(digest)
        code_bytes += len(text)
        if code_bytes <= max_code_bytes:
            add("code", side, text)
            for exercise in exercises(module, text):
                add("synthetic", side, exercise)
        add("web", side, "\n\n".join(_described(module, "")))
    for digest, text in sorted((_digest(text), text) for text in _topics()):
        add("acquired", _side(digest, _TOPICS_HELD_OUT_PERCENT), text)
    for texts in corpus.values():
        texts.sort(key=_digest)
    return corpus


def exercises(module: ast.Module, source: str) -> Iterator[str]:
    """Return documented functions of a module as tasks with answers.

    Args:
        module: parsed.
        source: its text.
    """
    lines = source.splitlines(keepends=True)
    for node in ast.walk(module):
        # A body that is only a docstring is not an answer.
        if not isinstance(node, ast.FunctionDef) or len(node.body) < 2:
            continue
        text = ast.get_docstring(node)
        if not text:
            continue
        first, body = node.body[0], node.body[1]
        head = "".join(lines[node.lineno - 1 : first.lineno - 1])
        end = first.end_lineno
        assert end is not None, "what is parsed has places"
        rest = "".join(lines[end : node.end_lineno])
        if body.lineno > end:
            answer = textwrap.dedent(head + rest).strip()
            yield f"Write the function `{node.name}`.\n\n{text}\n\nAnswer:\n\n{answer}\n"


def docstrings(source: str) -> str | None:
    """Return a module's docstrings under the names they describe; None if it is not Python."""
    module = _parsed(source)
    return None if module is None else "\n\n".join(_described(module, ""))


def _parsed(source: str) -> ast.Module | None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return ast.parse(source)
        except (SyntaxError, ValueError):
            return None


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _side(digest: str, percent: int = _HELD_OUT_PERCENT) -> str:
    return "_held_out" if int(digest[:8], 16) % 100 < percent else ""


def _sources() -> Iterator[str]:
    root = Path(sysconfig.get_path("stdlib"))
    paths = [
        path
        for path in sorted(root.rglob("*.py"))
        if _EXCLUDED_PARTS.isdisjoint(path.relative_to(root).parts)
    ]
    if not paths:
        raise DataError(
            f"no Python sources under {root}; use a CPython that keeps its standard library there"
        )
    for path in paths:
        try:
            yield importlib.util.decode_source(path.read_bytes())
        except (OSError, SyntaxError, UnicodeDecodeError):
            continue  # A dangling link, or a file that is not Python source.


def _topics() -> list[str]:
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise DataError(
            "this Python has no pydoc_data.topics, the language reference of help(); use a "
            "complete CPython 3.11 to 3.13"
        ) from None
    return list(topics.values())


_Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def _described(node: _Documented, name: str) -> Iterator[str]:
    text = ast.get_docstring(node)
    if text:
        yield f"{name}\n\n{text}" if name else text
    for child in node.body:
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _described(child, f"{name}.{child.name}" if name else child.name)
