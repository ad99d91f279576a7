"""What a file holds, by its name and its first line."""

import gzip
import json
from pathlib import Path

import pytest

from phi4.data.files.input_rows import list_parts
from phi4.data.files.inputs import Form, check_unchanged, find_inputs, form_of
from phi4.data.screens.quality.screen import QUARANTINE
from phi4.data.tokenize.documents import read_rows
from phi4.errors import DataError

LINES = b'{"text": "one"}\n{"text": "two"}\n'
PRETTY = json.dumps({"text": "one"}, indent=1).encode()


def texts(path: Path) -> list[object]:
    parts = list_parts(find_inputs([path]).files)
    return [row.content for part in parts for row in read_rows(part)]


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("a.jsonl", Form.LINES),
        ("a.JSONL.GZ", Form.LINES),
        ("a.ndjson.bz2", Form.LINES),
        ("a.json.zst", Form.LINES),
        ("a.Parquet", Form.PARQUET),
        ("plot.R", Form.TEXT),
        ("a.txt", Form.TEXT),
        ("a.csv", None),
        ("a.txt.gz", None),
        ("README", None),
        (".py", None),
    ],
)
def test_the_name_says_what_a_file_holds(name: str, form: Form | None) -> None:
    assert form_of(f"in.dir/{name}") is form


@pytest.mark.parametrize("name", ["a.json", "a.ndjson", "a.JSON"])
def test_rows_under_another_name_are_rows(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(LINES)
    assert texts(tmp_path / name) == ["one", "two"]
    (tmp_path / f"{name}.gz").write_bytes(gzip.compress(LINES))
    assert texts(tmp_path / f"{name}.gz") == ["one", "two"]


def test_first_row_that_is_longer_than_the_look_at_it(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(json.dumps({"text": "x" * 10_000}).encode() + b"\n" + LINES)
    assert [len(text) for text in texts(path)] == [10_000, 3, 3]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"text\none\n", r"a\.csv: its name does not determine its format.*\.jsonl"),
        ("README", b"one", "README: its name does not determine its format"),
        ("a.json", b'[{"text": "one"}]', r"a\.json begins with b'\['.*jq -c"),
        ("a.json", PRETTY, r"a\.json has a first line that is not a complete object.*jq -c"),
        ("none.csv", None, r"none\.csv cannot be read \(No such file"),
    ],
)
def test_named_file_that_cannot_be_read_is_refused(
    tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        find_inputs([tmp_path / name])


def test_directory_skips_what_it_cannot_read_and_counts_it(tmp_path: Path) -> None:
    work = tmp_path / "web.work"
    work.mkdir()
    files = {
        "a.JSONL": LINES,
        "b.json.gz": gzip.compress(LINES),
        "c.R": b"x <- 1",
        "d.hs": b"main",
        "e.ipynb": b"{}",
        "sub/f.HS": b"main",
        "LICENSE": b"free",
        "old.csv.gz": b"",
        "package.json": PRETTY,
        "web.rejected.jsonl": LINES,
        "web.plan.json": b"{}",
        "web.jsonl.partial-0123456789ab": LINES,
        QUARANTINE: LINES,
        "web.work/plan.json": b"{}",
        "web.work/000000.json": b"{}",
    }
    (tmp_path / "sub").mkdir()
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    found = find_inputs([tmp_path])
    assert [Path(file.path).name for file in found.files] == ["a.JSONL", "b.json.gz", "c.R"]
    assert found.skipped == {
        ".hs": 2,
        ".ipynb": 1,
        "no suffix": 1,
        ".csv.gz": 1,
        "JSON but not Lines": 1,
        "written by phi4": 4,
    }


def test_changed_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one")
    files = find_inputs([path]).files
    check_unchanged(files)
    path.write_text("longer")
    with pytest.raises(DataError, match=r"a\.txt changed while it was read: its size"):
        check_unchanged(files)
