"""Files of the screens: what they read, what they write, and that the next command can read it."""

import errno
import fcntl
import json
import os
import resource
import signal
from pathlib import Path

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from phi4.cli.data import app
from phi4.data.screens.decontaminate import Detector, decontaminate, read_benchmarks
from phi4.data.screens.quality.inputs import list_inputs
from phi4.data.screens.quality.outputs import Outputs, writing
from phi4.data.screens.quality.rows import Line, RowFormat, read_lines
from phi4.data.screens.quality.screen import Rejection, Rule, screen
from phi4.data.vocabulary.bpe import train_bpe
from phi4.data.vocabulary.tokenizer import rank_file_bytes
from phi4.errors import DataError, DiskFullError


def odd_length(length: int, line: Line) -> Rejection | None:
    return Rejection("odd") if length % 2 else None


RULE = Rule(len, odd_length)


def rows(path: Path, *texts: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def texts(path: Path) -> list[str]:
    return [json.loads(line)["text"] for line in path.read_text().splitlines()]


def tree(directory: Path) -> list[str]:
    return sorted(p.relative_to(directory).as_posix() for p in directory.rglob("*") if p.is_file())


def test_output_of_a_screen_is_the_input_of_the_next_command(tmp_path: Path) -> None:
    rows(tmp_path / "raw/en/0001.jsonl", "ab", "a", "even")
    rows(tmp_path / "raw/de/0001.jsonl", "cd", "c")
    once, twice = tmp_path / "once", tmp_path / "twice"
    screen([tmp_path / "raw"], once, RULE)
    assert tree(once) == ["de/0001.jsonl", "en/0001.jsonl", "quarantine.rejects"]
    # As a directory, and by the pattern that a shell would expand.
    assert screen([once], twice, RULE).num_kept == 3
    assert screen([*once.rglob("*.jsonl")], tmp_path / "named", RULE).rejected == {}
    assert tree(twice) == tree(once)
    assert texts(twice / "en/0001.jsonl") == ["ab", "even"]
    (once / "notes.md").write_text("no rows")
    (once / "web.rejected.jsonl").write_text('{"input": "web", "line": 1, "reason": "no text"}\n')
    assert screen([once], tmp_path / "again", RULE).num_rows == 3


def test_tokenizer_reads_what_a_screen_kept_and_nothing_else(tmp_path: Path) -> None:
    source = rows(tmp_path / "web.jsonl", "ab", "a", "even")
    bench = rows(tmp_path / "bench.jsonl", "no words of it are in the rows")
    decontaminate([source], Detector(read_benchmarks([bench])), tmp_path / "once")
    screen([tmp_path / "once"], tmp_path / "twice", RULE)
    ranks = tmp_path / "bpe.tiktoken"
    ranks.write_bytes(rank_file_bytes(train_bpe(["abc"], 354)))
    for directory, num_documents, num_own in (("once", 3, 2), ("twice", 2, 1)):
        out = ("--out", tmp_path / "tokens" / directory, "--ranks", ranks, "--workers", 1)
        arguments = ["tokenize", tmp_path / directory, *out]
        result = CliRunner().invoke(app, [*map(str, arguments)], catch_exceptions=False)
        assert f"{num_documents} documents" in result.output
        assert "rows rejected" not in result.output
        assert f"written by phi4 {num_own}" in result.output


def names(*inputs: Path) -> list[str]:
    return [item.name for item in list_inputs(inputs)]


def test_names_keep_apart_what_paths_keep_apart(tmp_path: Path) -> None:
    en, de = rows(tmp_path / "en/0001.jsonl"), rows(tmp_path / "de/0001.jsonl")
    other = rows(tmp_path / "en/sub/0002.jsonl.gz")
    assert names(en, other) == ["0001", "0002"]
    assert names(en, de) == ["en/0001", "de/0001"]
    assert names(tmp_path / "en", tmp_path / "de") == ["en/0001", "en/sub/0002", "de/0001"]
    assert names(tmp_path) == ["de/0001", "en/0001", "en/sub/0002"]
    assert names() == []
    with pytest.raises(DataError, match=r"en/0001\.jsonl is given 2 times"):
        names(tmp_path, en)
    rows(tmp_path / "en/0001.jsonl.gz")
    with pytest.raises(DataError, match=r"0001\.jsonl and .*\.gz would both get the name en/0001"):
        names(tmp_path)


def parquet(path: Path, **columns: pa.Array) -> Path:
    pq.write_table(pa.table(columns), path, row_group_size=3)
    return path


def test_rows_of_parquet_become_lines(tmp_path: Path) -> None:
    contents = ["ab", "a", "even", "four", "abc"]
    source = parquet(tmp_path / "web.parquet", content=pa.array(contents), id=pa.array(range(5)))
    form = RowFormat("content")
    outcome = screen([source], tmp_path / "out", RULE, row_format=form)
    assert outcome.rejected == {"odd": 2}
    kept = [json.loads(line) for line in (tmp_path / "out/web.jsonl").open()]
    assert kept == [{"content": contents[i], "id": i} for i in (0, 2, 3)]
    held = [json.loads(line) for line in (tmp_path / "out/quarantine.rejects").open()]
    assert [(row["line"], json.loads(row["row"])["content"]) for row in held] == [
        (2, "a"),
        (5, "abc"),
    ]


def test_bad_row_of_parquet_is_one_bad_row(tmp_path: Path) -> None:
    raw = pa.array([b"good", b"b\xffd", b"fine", b"x" * 99], pa.binary())
    text = pa.Array.from_buffers(pa.string(), 4, raw.buffers())
    source = parquet(tmp_path / "web.parquet", text=text)
    outcome = screen([source], tmp_path / "out", RULE, row_format=RowFormat(max_bytes=50))
    held = [json.loads(line) for line in (tmp_path / "out/quarantine.rejects").open()]
    assert outcome.num_kept == 2
    assert [(row["line"], row["reason"]) for row in held] == [
        (2, "invalid UTF-8 at byte 1"),
        (4, "110 bytes; at most 50 are read"),
    ]


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary()])
def test_bytes_of_text_in_parquet_are_strings(tmp_path: Path, kind: pa.DataType) -> None:
    raw = [b"good", b"b\xffd", "fein: \u00e4".encode(), None]
    columns = {"text": pa.array(raw, kind), "image": pa.array([b"\xff"] * 4, kind)}
    read = [line.raw for line in read_lines([parquet(tmp_path / "web.parquet", **columns)])]
    texts = [json.loads(read[i])["text"] for i in (0, 2, 3)]
    assert texts == ["good", "fein: \u00e4", None] and read[1] == b"b\xffd"


def test_batches_of_parquet_are_bounded_in_bytes(tmp_path: Path) -> None:
    texts = [str(i % 10) * 500_000 for i in range(60)]
    source = tmp_path / "large.parquet"
    # A page is decoded whole, so it must not be the whole column.
    pages = {"use_dictionary": False, "compression": "none", "write_batch_size": 1}
    pq.write_table(pa.table({"text": texts}), source, **pages)
    before = pa.total_allocated_bytes()
    peak = 0
    for line in read_lines([source]):
        peak = max(peak, pa.total_allocated_bytes() - before)
        assert len(msgspec.json.decode(line.raw)["text"]) == 500_000
    # The text is 30 MB; a batch is 8 MB, held once packed and once as values.
    assert peak < 24 << 20


def test_second_screen_of_a_directory_is_refused_and_the_first_goes_on(tmp_path: Path) -> None:
    source, out = rows(tmp_path / "web.jsonl", "ab", "a"), tmp_path / "out"
    (item,) = list_inputs([source])
    with Outputs([item], out) as first:
        first.keep(source, b"kept")
        first.hold(b"held")
        with pytest.raises(DataError, match=r"another job is writing to .*; give each its own"):
            screen([source], out, RULE)
    assert (out / "web.jsonl").read_bytes() == b"kept\n"
    assert (out / "quarantine.rejects").read_bytes() == b"held\n"
    with pytest.raises(DataError, match="exists; give another output directory"):
        screen([source], out, RULE)
    assert (out / "quarantine.rejects").read_bytes() == b"held\n"


def test_file_system_without_locks_is_written_all_the_same(tmp_path: Path, monkeypatch) -> None:
    def no_locks(stream: object, how: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    screen([rows(tmp_path / "web.jsonl", "ab")], tmp_path / "out", RULE)
    assert tree(tmp_path / "out") == ["quarantine.rejects", "web.jsonl"]


def test_output_that_cannot_be_written_is_one_clear_line(tmp_path: Path) -> None:
    source = rows(tmp_path / "web.jsonl", *["ab"] * 20_000)
    with pytest.raises(DataError, match=r"web\.jsonl/x: Not a directory; check the path"):
        screen([source], source / "x", RULE)
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(
            DiskFullError, match=r"out.*: File too large, .*; free some space or raise"
        ):
            screen([source], tmp_path / "out", RULE)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, old)
    assert tree(tmp_path / "out") == ["quarantine.rejects.part"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_full_disk_has_its_own_exit_code(number: int) -> None:
    with pytest.raises(DiskFullError, match=r"x: .*; free some space or raise"), writing(Path("x")):
        raise OSError(number, os.strerror(number))
