"""The corpus that every CPython carries: its standard library.

Sources are the code; docstrings and pydoc's language reference are the prose. It shows that a model
learns, and needs no download; it is no base for claims about capability. A module's docstrings go
to the same side of the training / held-out split as its source, so no held-out text was seen in the
other form.
"""

import ast
import hashlib
import importlib.util
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

from phi4.errors import DataError

# Tests, foreign packages, and tables that are neither code nor prose.
_EXCLUDED_PARTS = frozenset(
    {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    | {"encodings", "lib2to3", "pydoc_data", "turtledemo"}
)
_HELD_OUT_PERCENT = 5


def standard_library_corpus(max_code_bytes: int = 5_000_000) -> dict[str, list[str]]:
    """Documents of `code`, `prose`, `code_held_out` and `prose_held_out`.

    The order is that of the content hashes, which shuffles the documents and makes the cut at
    `max_code_bytes` a fair sample. A text appears once over all four.

    Raises:
        DataError: this Python comes without the sources or topics of its standard library.
    """
    corpus: dict[str, list[str]] = {
        name + side: [] for name in ("code", "prose") for side in ("", "_held_out")
    }
    seen: set[str] = set()
    code_bytes = 0

    def add(kind: str, side: str, text: str) -> None:
        digest = _digest(text)
        if text.strip() and digest not in seen:
            seen.add(digest)
            corpus[kind + side].append(text)

    for digest, text in sorted((_digest(text), text) for text in _sources()):
        prose = docstrings(text)
        if prose is None:
            continue
        code_bytes += len(text)
        if code_bytes <= max_code_bytes:
            add("code", _side(digest), text)
        add("prose", _side(digest), prose)
    for digest, text in sorted((_digest(text), text) for text in _topics()):
        add("prose", _side(digest), text)
    # Topics come after all docstrings; the hash mixes them.
    for name in ("prose", "prose_held_out"):
        corpus[name].sort(key=_digest)
    return corpus


def docstrings(source: str) -> str | None:
    """A module's docstrings under the names they describe; None when it is not Python."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            module = ast.parse(source)
        except (SyntaxError, ValueError):
            return None
    return "\n\n".join(_described(module, ""))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _side(digest: str) -> str:
    return "_held_out" if int(digest[:8], 16) % 100 < _HELD_OUT_PERCENT else ""


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
            continue  # a dangling link or a file that is no Python source


def _topics() -> list[str]:
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise DataError(
            "this Python has no pydoc_data.topics, the language reference of help(); use a "
            "complete CPython 3.11 to 3.13"
        ) from None
    return list(topics.values())


def _described(node: ast.AST, name: str) -> Iterator[str]:
    text = ast.get_docstring(node)
    if text:
        yield f"{name}\n\n{text}" if name else text
    for child in node.body:
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _described(child, f"{name}.{child.name}" if name else child.name)
