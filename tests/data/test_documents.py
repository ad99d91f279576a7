import bz2
import gzip
import json
from itertools import pairwise
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phi4.data.files import input_rows
from phi4.data.files.input_rows import BLANK, Part, list_parts
from phi4.data.files.inputs import find_inputs
from phi4.data.tokenize.documents import read_rows
from phi4.data.vocabulary.chat import Conversation
from phi4.errors import DataError

ROWS = [{"text": "one"}, {"text": " \n"}, {"text": "zwei ü"}, {"text": "three\nlines\n"}]
fixture_is_only_a_directory = settings(max_examples=60)


def parts_of(inputs: list[Path], **cut: int) -> list[Part]:
    return list_parts(find_inputs(inputs).files, **cut)


def rows(inputs: list[Path], text_column: str | None = None, **cut: int) -> list:
    return [row for part in parts_of(inputs, **cut) for row in read_rows(part, text_column)]


def texts(inputs: list[Path], **cut: int) -> list[str]:
    return [row.content for row in rows(inputs, **cut) if row.content is not None]


def jsonl(lines: list[dict]) -> bytes:
    return b"".join(json.dumps(line).encode() + b"\n" for line in lines)


def zstd(content: bytes) -> bytes:
    return pa.compress(content, codec="zstd", asbytes=True)


def test_inputs_are_read_in_order(tmp_path: Path) -> None:
    (tmp_path / "b.jsonl").write_bytes(jsonl(ROWS))
    (tmp_path / "a.txt").write_text("whole\nfile")
    tree = tmp_path / "tree"
    (tree / "sub").mkdir(parents=True)
    for name, text in {"z.py": "z = 1", "sub/a.c": "int a;", "x.png": "no"}.items():
        (tree / name).write_text(text)
    (tree / "rows.jsonl").write_bytes(jsonl([{"text": "row"}]))
    found = texts([tmp_path / "b.jsonl", tmp_path / "a.txt", tree])
    expected = ["one", "zwei ü", "three\nlines\n", "whole\nfile", "row", "int a;", "z = 1"]
    assert found == expected


@pytest.mark.parametrize(
    "form", ["jsonl", "jsonl.gz", "jsonl.zst", "ndjson.bz2", "json", "json.gz", "JSONL", "parquet"]
)
def test_every_form_gives_the_same_rows(tmp_path: Path, form: str) -> None:
    path, content = tmp_path / f"rows.{form}", jsonl(ROWS)
    if form == "parquet":
        pq.write_table(pa.Table.from_pylist(ROWS), path, row_group_size=2)
    else:
        packs = {"gz": gzip.compress, "zst": zstd, "bz2": bz2.compress}
        path.write_bytes(packs.get(form.rpartition(".")[2], bytes)(content))
    found = rows([path])
    assert [row.content for row in found] == ["one", None, "zwei ü", "three\nlines\n"]
    assert [row.number for row in found] == [1, 2, 3, 4]
    assert found[1].reason == BLANK


def test_parquet_is_cut_at_row_groups_and_inside_of_large_ones(tmp_path: Path) -> None:
    table = pa.Table.from_pylist([{"text": f"row {i}", "other": i} for i in range(10)])
    pq.write_table(table, tmp_path / "x.parquet", row_group_size=3)
    path = tmp_path / "x.parquet"
    for part_bytes, bounds in {path.stat().st_size // 2: [0, 3, 6, 10], 1: range(11)}.items():
        found = [(part.begin, part.end) for part in parts_of([path], part_bytes=part_bytes)]
        assert found == list(pairwise(bounds))
        assert texts([path], part_bytes=part_bytes) == [f"row {i}" for i in range(10)]


@fixture_is_only_a_directory
@given(
    lines=st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=20), max_size=12),
    part_bytes=st.integers(1, 200),
    ends_with_break=st.booleans(),
)
def test_every_line_is_in_one_part(
    tmp_path: Path, lines: list[str], part_bytes: int, ends_with_break: bool
) -> None:
    path = tmp_path / "x.jsonl"
    content = "\n".join(json.dumps({"text": f"t{line}"}) for line in lines).replace("\\u0000", "")
    path.write_text(content + "\n" * ends_with_break)
    expected = [f"t{line}".replace("\0", "") for line in lines]
    assert texts([path], part_bytes=part_bytes) == expected


BAD = {
    b'{"text": 3}': "expected a string under 'text', got int",
    b'{"body": "x"}': "expected a string under 'text', got nothing",
    b'["text"]': "expected a JSON object, got list",
    b"{": "invalid JSON: Input data was truncated",
    b'{"text": "\xff"}': "invalid UTF-8 at byte ",
    b'{"text": "\\ud800"}': "invalid JSON",
    b'{"text": "x", "s": NaN, "t": "\\ud800"}': "invalid JSON",
    b'{"text": null}': "expected a string under 'text', got null",
    b'{"text": "a\\u0000"}': "NUL at character 1",
    b'{"messages": []}': "chat column messages is []",
    b'{"messages": [{"role": "tool", "content": "x"}]}': "role 'tool'",
    b"  ": BLANK,
    b'{"text": "\\n "}': BLANK,
}


@pytest.mark.parametrize("line", BAD)
def test_bad_row_is_a_reason(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"text": "fine"}\n' + line + b'\n{"text": "too"}\n')
    good, bad, last = rows([path])
    assert (good.content, bad.content, last.content) == ("fine", None, "too")
    assert bad.number == 2 and BAD[line] in bad.reason and "\n" not in bad.reason


def test_endless_line_is_a_reason_and_is_never_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(input_rows, "MAX_ROW_BYTES", 1000)
    path = tmp_path / "x.jsonl"
    endless = b'{"text": "' + b"a" * 5000 + b'"}'
    path.write_bytes(b"\n".join([jsonl([{"text": "fine"}])[:-1], endless, b'{"text": "too"}']))
    for part_bytes in (10_000, 700):
        found = rows([path], part_bytes=part_bytes)
        assert [row.content for row in found] == ["fine", None, "too"]
        assert found[1].reason == "5012 bytes; at most 1000 are read"
    (tmp_path / "x.txt").write_bytes(endless)
    assert "5012 bytes" in rows([tmp_path / "x.txt"])[0].reason


def test_text_file_that_is_not_utf8_is_a_reason(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_bytes(b"abc\xff")
    (row,) = rows([tmp_path])
    assert row.reason == "invalid UTF-8 at byte 3" and row.path.endswith("x.txt")


def test_conversations_are_read_under_their_columns(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    turns = [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]
    path.write_bytes(jsonl([{"messages": turns}, {"prompt": "p", "completion": "c"}]))
    found = texts([path])
    assert all(isinstance(content, Conversation) for content in found)
    assert [message.content for message in found[1].messages] == ["p", "c"]


@pytest.mark.parametrize("name", ["none.txt", "none.jsonl", "none.parquet"])
def test_missing_input(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match=f"{name} cannot be read"):
        find_inputs([tmp_path / name])


@pytest.mark.parametrize("form", ["jsonl.gz", "jsonl.zst", "parquet"])
@pytest.mark.parametrize("damage", ["truncated", "foreign"])
def test_damaged_file_is_one_clear_line(tmp_path: Path, form: str, damage: str) -> None:
    path = tmp_path / f"x.{form}"
    many = [{"text": f"row {i} " + "x" * i} for i in range(2000)]
    if form == "parquet":
        pq.write_table(pa.Table.from_pylist(many), path)
    else:
        pack = gzip.compress if form == "jsonl.gz" else zstd
        path.write_bytes(pack(jsonl(many)))
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2] if damage == "truncated" else b"not it" * 100)
    with pytest.raises(DataError, match=rf"x\.{form} (cannot be read|is not a parquet)") as caught:
        rows([path])
    assert "\n" not in str(caught.value)


CHAT = [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]


@pytest.mark.parametrize(
    "row",
    [
        {"text": "x", "messages": CHAT},
        {"text": "x", "prompt": "p", "completion": "c"},
        {"text": "", "messages": CHAT},
    ],
)
def test_row_with_text_and_conversation_needs_a_choice(tmp_path: Path, row: dict) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(jsonl([row]))
    (refused,) = rows([path])
    assert refused.content is None
    assert "holds 'text' and a conversation; choose with --text-field" in refused.reason
    assert [found.content or "" for found in rows([path], "text")] == [row["text"]]
    (chat,) = rows([path], "messages")
    assert [message.role for message in chat.content.messages] == ["user", "assistant"]


@pytest.mark.parametrize(
    "row",
    [
        {"text": None, "messages": CHAT},
        {"messages": CHAT, "prompt": None, "completion": None},
        {"messages": None, "prompt": "u", "completion": "a"},
    ],
)
def test_null_is_no_column(tmp_path: Path, row: dict) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(jsonl([row, {"text": "x", "messages": None}, {"text": "y", "prompt": "p"}]))
    chat, text, prompted = rows([path])
    assert [message.content for message in chat.content.messages] == ["u", "a"]
    assert (text.content, prompted.content) == ("x", "y")


@pytest.mark.parametrize(
    "line",
    [
        b'\xef\xbb\xbf{"text": "x"}',
        b'{"text": "x", "score": NaN, "bounds": [-Infinity, Infinity]}',
        b'{"text": "x", "n": ' + b"9" * 5000 + b"}",
    ],
)
def test_rows_that_other_writers_write_are_read(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(line + b"\n")
    assert texts([path]) == ["x"]


def test_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_bytes(b"\xef\xbb\xbfone")
    assert texts([tmp_path]) == ["one"]
