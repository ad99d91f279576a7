import json
from pathlib import Path

import pytest

from phi4.data import Tokenizer
from phi4.data.bpe import train_bpe
from phi4.data.documents import read_documents, write_documents
from phi4.data.token_file import TokenFile
from phi4.errors import DataError


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(train_bpe(["the cat sat on the mat\n"] * 3, 360))


def jsonl(path: Path, *lines: object) -> Path:
    path.write_text("\n".join(json.dumps(line) for line in lines) + "\n\n")
    return path


def test_inputs_are_read_in_order(tmp_path: Path) -> None:
    rows = jsonl(tmp_path / "b.jsonl", {"text": "one"}, {"text": " \n"}, {"text": "zwei ü"})
    (tmp_path / "a.txt").write_text("whole\nfile")
    tree = tmp_path / "tree"
    (tree / "sub").mkdir(parents=True)
    for name, text in {"z.py": "z = 1", "sub/a.c": "int a;", "empty.py": "", "x.png": "no"}.items():
        (tree / name).write_text(text)
    found = list(read_documents([rows, tmp_path / "a.txt", tree]))
    assert found == ["one", "zwei ü", "whole\nfile", "int a;", "z = 1"]


def test_documents_are_written_with_their_end(tmp_path: Path, tokenizer: Tokenizer) -> None:
    texts = ["the cat <|endoftext|>", "sat"]
    manifest = write_documents(texts, tokenizer, tmp_path / "p")
    pair = TokenFile(tmp_path / "p")
    assert manifest == pair.require_tokenizer(tokenizer.facts)
    documents = [pair.document(i).tolist() for i in range(2)]
    assert documents == [[*tokenizer.encode(text), tokenizer.eod_id] for text in texts]
    assert sum(document.count(tokenizer.eod_id) for document in documents) == 2


def test_nothing_to_write_leaves_no_file(tmp_path: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match="the inputs hold no text"):
        write_documents([], tokenizer, tmp_path / "out" / "p")
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    "line", ['{"text": 3}', '{"body": "x"}', '["text"]', '"text"', "{", b'{"text": "\xff"}']
)
def test_bad_row_is_named(tmp_path: Path, line: str | bytes) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"text": "fine"}\n' + (line if isinstance(line, bytes) else line.encode()))
    with pytest.raises(DataError, match=r"rows\.jsonl, line 2: expected"):
        list(read_documents([path]))


@pytest.mark.parametrize("name", ["none.txt", "none.jsonl"])
def test_missing_input(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match=f"{name} cannot be read"):
        list(read_documents([tmp_path / name]))


def test_text_that_is_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_bytes(b"abc\xff")
    with pytest.raises(DataError, match=r"x\.txt is not UTF-8 \(byte 3\)"):
        list(read_documents([tmp_path]))
