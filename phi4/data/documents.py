"""Documents in, token files out: jsonl, text files and source trees, read in a fixed order."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from phi4.data.manifest import Manifest
from phi4.data.token_writer import TokenFileWriter
from phi4.data.tokenizer import Tokenizer
from phi4.errors import DataError

TREE_SUFFIXES = frozenset(
    {".md", ".rst", ".tex", ".txt"}
    | {".c", ".cc", ".cpp", ".cs", ".cu", ".go", ".h", ".hpp", ".java", ".jl", ".js", ".kt", ".lua"}
    | {".php", ".pl", ".py", ".r", ".rb", ".rs", ".scala", ".sh", ".sql", ".swift", ".ts"}
)
"""Files that count as text when a directory is given; a file named itself always does."""


def read_documents(inputs: Iterable[str | Path]) -> Iterator[str]:
    """Texts of all inputs, in their order; trees in sorted path order. Blank texts are left out.

    Args:
        inputs: `.jsonl` files with a `text` field, other files as one document each, directories.

    Raises:
        DataError: an input is missing, not UTF-8, or a line is not a JSON object with a `text`.
    """
    for item in map(Path, inputs):
        if item.is_dir():
            paths = sorted(path for path in item.rglob("*") if path.suffix in TREE_SUFFIXES)
            texts = (_read_text(path) for path in paths if path.is_file())
        elif item.suffix == ".jsonl":
            texts = _read_jsonl(item)
        else:
            texts = iter([_read_text(item)])
        yield from (text for text in texts if text.strip())


def write_documents(texts: Iterable[str], tokenizer: Tokenizer, prefix: str | Path) -> Manifest:
    """Tokenize texts into `PREFIX.bin/.idx`, each closed by the end-of-document token.

    Raises:
        DataError: there is no text; no file is left then.
    """
    with TokenFileWriter(prefix, tokenizer.facts) as writer:
        for text in texts:
            ids = tokenizer.encode(text)
            ids.append(tokenizer.eod_id)
            writer.add(np.array(ids, dtype=np.int32))
        if not writer.num_documents:
            raise DataError(
                f"nothing to write to {prefix}: the inputs hold no text; directories are searched "
                "for source and text files"
            )
    return writer.manifest


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); check the path") from None
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8 (byte {error.start}); convert it or leave it out"
        ) from None


def _read_jsonl(path: Path) -> Iterator[str]:
    try:
        stream = path.open("rb")
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); check the path") from None
    with stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            try:
                text = json.loads(line)["text"]
            except (ValueError, TypeError, KeyError):
                text = None
            if not isinstance(text, str):
                raise DataError(
                    f'{path}, line {number}: expected a JSON object with a "text" string; mend '
                    "or remove the line"
                )
            yield text
