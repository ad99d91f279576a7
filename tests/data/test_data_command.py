"""`phi4 data tokenize`, `merge`, `inspect` and `verify` from the command line."""

import json
import os
from pathlib import Path

import pytest

from phi4.cli import data, main
from phi4.config import TokenizerConfig
from phi4.data.files import atomic_files
from phi4.data.files.token_writer import TokenFileWriter
from phi4.data.vocabulary.tokenizer import TokenizerFacts


class EndedError(Exception):
    """A command that ended with an error: its exit code and its last line."""


@pytest.fixture
def run(config: TokenizerConfig, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch):
    def run(command: str, *arguments: object) -> str:
        options = ["--ranks", config.path] if command != "verify" else []
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main(["data", command, *map(str, arguments), *options])
        out = capsys.readouterr()
        if ended.value.code:
            raise EndedError(ended.value.code, out.err.splitlines()[-1])
        return out.out + out.err

    return run


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": f"the cat {i}"}) + "\n" for i in range(20)))
    return path


def failure(run, *arguments: object) -> tuple[int, str]:
    with pytest.raises(EndedError) as caught:
        run(*arguments)
    return caught.value.args


def test_late_jobs_and_other_corpora_under_a_finished_prefix(
    run, rows: Path, tmp_path: Path
) -> None:
    out, options = tmp_path / "p", ("--workers", 1)
    assert "20 documents" in run("tokenize", rows, "--out", out, *options)
    for late in (("--shard", "0/2"), ()):
        assert "p is finished" in run("tokenize", rows, "--out", out, *options, *late)
    assert "20 documents" in run("tokenize", rows, "--out", tmp_path / "q", *options)
    (tmp_path / "x.txt").write_text("the mat")
    other = ("tokenize", tmp_path / "x.txt", "--out", out, *options)
    code, line = failure(run, *other)
    assert code == 2 and "other inputs: with" in line and "--overwrite" in line
    assert "1 documents" in run(*other, "--overwrite")
    assert not (tmp_path / "p.work").exists()


def test_rows_left_out_are_explained(run, rows: Path, tmp_path: Path) -> None:
    rows.write_text(rows.read_text() + "\n\n")
    printed = run("tokenize", rows, "--out", tmp_path / "p", "--max-rejected", 0)
    assert "2 rows left out (bad or blank: see " in printed and "p.rejected.jsonl)" in printed
    rows.write_text('{"body": "x"}\n' * 3)
    code, line = failure(run, "tokenize", rows, "--out", tmp_path / "q")
    assert code == 2 and "none of 3 rows is a document" in line
    assert "expected a string under 'text', got nothing" in line and "q.rejected.jsonl" in line
    assert "3 documents" in run("tokenize", rows, "--out", tmp_path / "q", "--text-field", "body")


def test_skipped_files_of_a_directory_are_counted(run, rows: Path, tmp_path: Path) -> None:
    for name in ("a.hs", "b.hs", "c.ipynb"):
        (tmp_path / name).write_text("x")
    printed = run("tokenize", tmp_path, "--out", tmp_path / "out" / "p")
    assert "3 files skipped: .hs 2, .ipynb 1" in printed


def test_what_the_system_refuses_is_one_line(
    run, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, line = failure(run, "tokenize", rows, "--out", rows / "p")
    assert code == 2 and line.startswith("DataError: ") and "Not a directory" in line
    (tmp_path / "p.work").write_text("a file")
    code, line = failure(run, "tokenize", rows, "--out", tmp_path / "p")
    assert code == 2 and line.startswith("DataError: ") and "p.work" in line

    def refuse(stream: object) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(atomic_files, "_sync_and_close", refuse)
    code, line = failure(run, "tokenize", rows, "--out", tmp_path / "q")
    assert code == 4 and "DiskFullError: " in line and "bytes are free" in line


def test_samples_need_the_tokenizer_that_wrote_them(
    run, facts: TokenizerFacts, write_source, rows: Path, tmp_path: Path
) -> None:
    run("tokenize", rows, "--out", tmp_path / "p", "--keep-order")
    assert "the cat 0" in run("inspect", tmp_path / "p", "--samples", 1)
    foreign = write_source("foreign", [3])
    code, line = failure(run, "inspect", foreign, "--samples", 1)
    assert code == 2 and "was written by tokenizer ffff" in line and "--ranks" in line


def test_verify_and_inspect_take_what_a_recipe_takes(
    run, facts: TokenizerFacts, write_source, tmp_path: Path
) -> None:
    prefixes = [write_source(f"web-{i}", [3 + i]) for i in range(3)]
    (tmp_path / "some.list").write_text("web-2\nweb-0\n")
    assert run("verify", f"{tmp_path}/web-*").count("checksums match") == 3
    assert run("inspect", tmp_path / "some.list").count("1 documents") == 2
    Path(f"{prefixes[1]}.bin").write_bytes(b"")
    code, line = failure(run, "verify", f"{tmp_path}/web-*")
    assert code == 2 and "1 of 3 pairs under" in line
    with TokenFileWriter(tmp_path / "web[1]", facts) as writer:
        writer.add([5, 5, 5, 5, 5, 5, 0])
    (tmp_path / "web1.bin").write_bytes(b"")
    assert "web[1]: 1 documents, 7 tokens" in run("inspect", tmp_path / "web[1]")


def test_workers_follow_the_cpus_of_the_process(
    run, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    monkeypatch.setattr(data, "tokenize_parts", lambda *_, workers, **__: seen.append(workers))
    monkeypatch.setattr(data, "merge", lambda prefix: None)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3})
    monkeypatch.delenv("SLURM_CPUS_PER_TASK", raising=False)
    run("tokenize", rows, "--out", tmp_path / "p")
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "5")
    run("tokenize", rows, "--out", tmp_path / "p")
    run("tokenize", rows, "--out", tmp_path / "p", "--workers", 2)
    assert seen == [1, 5, 2]
