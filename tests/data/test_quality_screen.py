import gzip
import json
import resource
from collections import Counter
from functools import partial
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from phi4.data.screens.quality.rows import Line, RowError, RowFormat, parse, read_lines, text_of
from phi4.data.screens.quality.screen import Rejection, Rule, screen
from phi4.errors import DataError


def vowels(text: str) -> int:
    return sum(letter in "aeiou" for letter in text)


def no_more_than_two(count: int, line: Line) -> Rejection | None:
    return Rejection("vowels", {"count": count, "at": line.number}) if count > 2 else None


VOWELS = Rule(vowels, no_more_than_two)


def write(path: Path, *lines: bytes) -> Path:
    path.write_bytes(b"\n".join(lines))
    return path


def quarantined(directory: Path) -> list[dict]:
    return [
        json.loads(line) for line in (directory / "quarantine.rejects").read_text().splitlines()
    ]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (b'{"text": "\xff"}', "invalid UTF-8 at byte 10"),
        (b'{"text": "a\x00b"}', "invalid JSON: JSON is malformed: invalid character"),
        (b'{"text": "a\\u0000b"}', "NUL at character 1"),
        (b'{"text": "\\udc80"}', "invalid JSON: JSON is malformed: invalid utf-16 surrogate"),
        (b'{"text": "x"', "invalid JSON"),
        (b"[" * 100_000, "invalid JSON"),
        (b"7", "expected a JSON object, got int"),
        (b'{"text": 7}', "text is int, not text"),
        (b'{"body": "x"}', "none of text, messages"),
        (b'{"messages": [{"role": "user"}]}', "messages has a message without a content string"),
    ],
)
def test_bad_row_goes_to_quarantine_with_its_reason(
    tmp_path: Path, row: bytes, reason: str
) -> None:
    source = write(tmp_path / "rows.jsonl", b'{"text": "b"}', row, b'{"text": "c"}')
    outcome = screen([source], tmp_path / "out", VOWELS)
    assert outcome.num_kept == 2 and outcome.rejected == {"bad row": 1}
    (held,) = quarantined(tmp_path / "out")
    assert held["line"] == 2 and held["file"] == str(source)
    assert held["reason"].startswith(reason)
    assert held["row"] == row.decode("utf-8", "backslashreplace")


def test_line_of_100_mb_is_quarantined_and_never_held(tmp_path: Path) -> None:
    source = tmp_path / "rows.jsonl"
    with source.open("wb") as stream:
        stream.write(b'{"text": "b"}\n{"text": "')
        for _ in range(100):
            stream.write(b"x" * (1 << 20))
        stream.write(b'"}\n{"text": "c"}\n')
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    outcome = screen([source], tmp_path / "out", VOWELS, row_format=RowFormat(max_bytes=1 << 20))
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert outcome.num_kept == 2 and outcome.rejected == {"bad row": 1}
    (held,) = quarantined(tmp_path / "out")
    assert held["reason"] == "104857612 bytes; at most 1048576 are read"
    assert held["row"] == '{"text": "' + "x" * 990
    assert grown < 30 << 20


@given(
    st.lists(st.binary(max_size=12).filter(lambda raw: not set(raw) & set(b"\r\n"))), st.booleans()
)
def test_lines_are_those_of_the_file(tmp_path_factory, raws: list[bytes], ends: bool) -> None:
    path = tmp_path_factory.mktemp("lines") / "x.jsonl"
    path.write_bytes(b"\n".join(raws) + (b"\n" if ends else b""))
    lines = list(read_lines([path], RowFormat(max_bytes=8)))
    expected = [(i, raw) for i, raw in enumerate(raws, 1) if len(raw) > 8 or raw.strip()]
    assert [(line.number, line.num_bytes) for line in lines] == [(i, len(r)) for i, r in expected]
    assert all(
        line.raw == raw for line, (_, raw) in zip(lines, expected, strict=True) if len(raw) <= 8
    )


@pytest.mark.parametrize("num_workers", [1, 2])
def test_outcome_does_not_depend_on_workers(tmp_path: Path, num_workers: int) -> None:
    texts = [("a" * (i % 4)) + "b" * (i % 7) + str(i) for i in range(2000)]
    rows = [json.dumps({"text": text, "id": i}).encode() for i, text in enumerate(texts)]
    rows[700] = b"\xff"
    first = write(tmp_path / "one.jsonl", *rows[:1200])
    second = tmp_path / "two.jsonl.gz"
    second.write_bytes(gzip.compress(b"\n".join(rows[1200:])))
    out = tmp_path / "out"
    outcome = screen([first, second], out, VOWELS, num_workers=num_workers)
    kept = [raw for i, raw in enumerate(rows) if i % 4 < 3 and i != 700]
    written = [*(out / "one.jsonl").read_bytes().splitlines()]
    written += (out / "two.jsonl").read_bytes().splitlines()
    assert written == kept
    assert outcome.rejected == Counter({"vowels": 500, "bad row": 1})
    assert outcome.num_rows == 2000
    held = quarantined(out)
    assert len(held) == 501
    assert held[0] == {
        "file": str(first),
        "line": 4,
        "reason": "vowels",
        "count": 3,
        "at": 4,
        "row": rows[3].decode(),
    }
    assert sorted(path.name for path in out.iterdir()) == [
        "one.jsonl",
        "quarantine.rejects",
        "two.jsonl",
    ]


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_packed_inputs_are_read_alike(tmp_path: Path, suffix: str) -> None:
    content = b'{"text": "b"}\n{"text": "aaa"}\nno row\n'
    pack = {"": bytes, ".gz": gzip.compress, ".zst": partial(pa.compress, codec="zstd")}[suffix]
    source = write(tmp_path / f"rows.jsonl{suffix}", bytes(pack(content)))
    outcome = screen([source], tmp_path / "out", VOWELS)
    assert outcome.rejected == {"vowels": 1, "bad row": 1}
    assert (tmp_path / "out" / "rows.jsonl").read_bytes() == b'{"text": "b"}\n'


def test_too_many_bad_rows_stop_the_job_and_are_kept_to_look_at(tmp_path: Path) -> None:
    source = write(tmp_path / "rows.jsonl", *[b'{"text": "b"}', b"no row"] * 3)
    with pytest.raises(DataError, match=r"2 rows are bad, at most 1 .*quarantine\.rejects\.part"):
        screen([source], tmp_path / "out", VOWELS, max_bad_rows=1)
    held = (tmp_path / "out" / "quarantine.rejects.part").read_text().splitlines()
    assert [json.loads(line)["line"] for line in held] == [2, 4]
    assert not (tmp_path / "out" / "rows.jsonl").exists()
    assert screen([source], tmp_path / "out", VOWELS, max_bad_rows=3).num_kept == 3


def test_job_that_fails_leaves_no_finished_output(tmp_path: Path) -> None:
    source = write(tmp_path / "rows.jsonl", b'{"text": "b"}')
    with pytest.raises(ZeroDivisionError):
        screen([source], tmp_path / "out", Rule(vowels, lambda count, line: 1 / 0))
    assert all(path.name.endswith(".part") for path in (tmp_path / "out").iterdir())
    assert screen([source], tmp_path / "out", VOWELS).num_kept == 1


def test_wrong_inputs_and_outputs_are_one_clear_line(tmp_path: Path) -> None:
    source = write(tmp_path / "rows.jsonl", b'{"text": "b"}')
    (tmp_path / "empty").mkdir()
    broken = write(tmp_path / "broken.jsonl.gz", gzip.compress(b"x" * 999)[:-9])
    packed = write(tmp_path / "rows.jsonl.gz", gzip.compress(b"{}"))
    cases = [
        ([source, packed], "rows.jsonl and .*rows.jsonl.gz would both get the name rows"),
        ([source, source], "rows.jsonl is given 2 times"),
        ([tmp_path / "none.jsonl"], "none.jsonl cannot be read"),
        ([write(tmp_path / "rows.csv", b"x")], "its name does not determine its format"),
        ([tmp_path / "empty"], "empty holds no rows; give .jsonl"),
        ([write(tmp_path / "rows.txt", b"x")], "rows.txt holds no rows; give .jsonl"),
        ([broken], "broken.jsonl.gz cannot be read"),
        ([write(tmp_path / "foreign.jsonl.zst", b"x" * 99)], "foreign.jsonl.zst cannot be read"),
        ([write(tmp_path / "foreign.parquet", b"x" * 99)], "foreign.parquet is not a parquet file"),
        ([write(tmp_path / "other.jsonl", b'{"body": "x"}')], "all 1 rows are bad .*--text-field"),
    ]
    for number, (inputs, message) in enumerate(cases):
        with pytest.raises(DataError, match=message):
            screen(inputs, tmp_path / f"out{number}", VOWELS)
    screen([source], tmp_path / "out", VOWELS)
    with pytest.raises(DataError, match=r"rows\.jsonl exists; give another"):
        screen([source], tmp_path / "out", VOWELS)


def test_text_of_chat_columns_has_every_turn() -> None:
    turn = {"role": "user", "content": "one"}
    assert text_of({"messages": [turn, turn]}) == "one\none"
    assert text_of({"messages": [turn], "text": "two"}, RowFormat("messages")) == "one"
    assert text_of({"body": "two", "text": "one"}, RowFormat("body")) == "two"
    assert text_of({"prompt": "p", "chosen": [turn], "rejected": "r", "score": 3}) == "p\none\nr"
    with pytest.raises(RowError, match="none of"):
        text_of(parse(Line(Path("x"), 1, b'{"id": "x"}', 11)))
