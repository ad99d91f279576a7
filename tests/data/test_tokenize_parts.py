"""The work directory: whose files are whose, what may change, and jobs that come late or twice."""

import dataclasses
import errno
import fcntl
import functools
import itertools
import json
import os
import shlex
import shutil
import subprocess
from pathlib import Path

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from phi4.config import TokenizerConfig
from phi4.data.files import atomic_files
from phi4.data.files.atomic_files import HashedFile, write_atomically
from phi4.data.files.inputs import find_inputs
from phi4.data.files.token_file import TokenFile
from phi4.data.files.token_writer import TokenFileWriter
from phi4.data.tokenize import merge as token_merge
from phi4.data.tokenize.job import TokenizeProgress, tokenize_parts
from phi4.data.tokenize.merge import merge_runs
from phi4.data.tokenize.parts import is_finished, work_directory
from phi4.data.tokenize.plan import TokenizePlan, make_plan
from phi4.data.vocabulary.tokenizer import TokenizerFacts, load_tokenizer
from phi4.errors import DataError, DiskFullError


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "rows.jsonl", "cat")


def write_rows(path: Path, word: str) -> Path:
    lines = (json.dumps({"text": f"the {word} {i} sat on the mat"}) + "\n" for i in range(60))
    path.write_text("".join(lines))
    return path


def plan_of(config: TokenizerConfig, *inputs: Path, **options: object) -> TokenizePlan:
    options = {"part_bytes": 500, **options}
    return make_plan(find_inputs(inputs), load_tokenizer(config).facts, **options)


def tokenize(
    plan: TokenizePlan,
    prefix: Path,
    config: TokenizerConfig,
    follow=lambda progress: None,
    **options,
) -> None:
    options = {"workers": 1, "max_rejected": 0, **options}
    tokenize_parts(plan, prefix, config, follow=follow, **options)


def names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


@pytest.mark.parametrize("name", ["thesis.tex", "000000.json", ".hidden"])
def test_directory_of_somebody_else_is_refused(
    config: TokenizerConfig, rows: Path, tmp_path: Path, name: str
) -> None:
    work = work_directory(tmp_path / "p")
    work.mkdir()
    (work / name).write_text("mine")
    with pytest.raises(DataError, match=rf"p\.work holds {name} and no plan\.json"):
        tokenize(plan_of(config, rows), tmp_path / "p", config)
    assert (work / name).read_text() == "mine"
    assert rows.exists()


def test_only_files_of_the_plan_are_removed(
    config: TokenizerConfig, rows: Path, tmp_path: Path
) -> None:
    plan, work = plan_of(config, rows), work_directory(tmp_path / "p")
    tokenize(plan, tmp_path / "p", config)
    kept = {"notes.txt", "100000.json", "plan.json.backup"}
    for name in kept:
        (work / name).write_text("mine")
    (work / "000001-0000.keys.partial-0123456789ab").write_text("of a killed job")
    inputs = rows.read_bytes()
    merge_runs(tmp_path / "p")
    assert names(work) == kept
    assert rows.read_bytes() == inputs


def test_killed_before_its_plan_was_written(
    config: TokenizerConfig, rows: Path, tmp_path: Path
) -> None:
    work = work_directory(tmp_path / "p")
    work.mkdir()
    (work / "plan.json.partial-0123456789ab").write_text("{")
    tokenize(plan_of(config, rows), tmp_path / "p", config)
    assert merge_runs(tmp_path / "p").num_documents == 60


@pytest.mark.parametrize("change", ["cut", "grown", "replaced", "touched"])
def test_input_that_changes_while_it_is_read_is_named(
    config: TokenizerConfig, rows: Path, tmp_path: Path, change: str
) -> None:
    def disturb(progress: TokenizeProgress) -> None:
        if change == "cut":
            os.truncate(rows, rows.stat().st_size // 2)
        elif change == "grown":
            rows.write_text(rows.read_text() + '{"text": "more"}\n')
        elif change == "replaced":
            os.replace(write_rows(tmp_path / "other.jsonl", "dog"), rows)
        else:
            os.utime(rows, ns=(0, 10**9))

    plan = plan_of(config, rows)
    with pytest.raises(DataError, match=r"rows\.jsonl changed while it was read"):
        tokenize(plan, tmp_path / "p", config, follow=disturb)
    with pytest.raises(DataError, match="are not tokenized"):
        merge_runs(tmp_path / "p")


def listed_lines(error: DataError) -> list[int]:
    """The lines in the list that the message names."""
    path = str(error).partition("see ")[2].partition(",")[0]
    return [json.loads(line)["line"] for line in Path(path).read_text().splitlines()]


@pytest.mark.parametrize(("form", "num_parts"), [("jsonl", 7), ("jsonl", 8), ("parquet", 7)])
def test_jobs_that_stop_early_list_the_lines_of_the_file(
    config: TokenizerConfig, tmp_path: Path, form: str, num_parts: int
) -> None:
    """Every part is a shard of its own, so nobody else has read what lies before it."""
    texts = [f"the cat {'sat ' * (i % 5)}" for i in range(60)]
    texts[0] = texts[41] = texts[42] = texts[59] = None
    path = tmp_path / f"rows.{form}"
    if form == "parquet":
        pq.write_table(pa.table({"text": texts}), path, row_group_size=7)
    else:
        path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    plan = plan_of(config, path, part_bytes=-(-path.stat().st_size // num_parts))
    count, found, lists = len(plan.parts), [], set()
    assert count == num_parts
    for index in range(count):
        try:
            tokenize(plan, tmp_path / "p", config, shard=(index, count))
        except DataError as error:
            found += listed_lines(error)
            lists.add(str(error).partition("see ")[2].partition(",")[0])
    assert found == [1, 42, 43, 60]
    assert all(Path(name).exists() for name in lists) and len(lists) > 2
    # What one of them lists does not change when the others have reported.
    tokenize(plan, tmp_path / "p", config, max_rejected=4)
    merge_runs(tmp_path / "p")
    rejected = Path(f"{tmp_path}/p.rejected.jsonl").read_text().splitlines()
    assert [json.loads(line)["line"] for line in rejected] == found
    assert not work_directory(tmp_path / "p").exists()


def test_what_differs_from_the_begun_plan_is_said(
    config: TokenizerConfig, rows: Path, tmp_path: Path
) -> None:
    other = write_rows(tmp_path / "other.jsonl", "dog")
    begun = plan_of(config, rows)
    tokenize(begun, tmp_path / "p", config, shard=(0, 2))

    def refused(plan: TokenizePlan) -> str:
        with pytest.raises(DataError, match=r"p\.work was created with ") as caught:
            tokenize(plan, tmp_path / "p", config, shard=(1, 2))
        assert "\n" not in str(caught.value)
        return str(caught.value).partition("created with ")[2]

    changed = {
        "--keep-order": plan_of(config, rows, seed=None),
        "--text-field": plan_of(config, rows, text_column="body"),
        "other inputs: with ": plan_of(config, other),
        "other inputs: without ": plan_of(config, rows, other),
        "split into other parts": plan_of(config, rows, part_bytes=600),
        "another tokenizer": msgspec.structs.replace(
            begun, tokenizer=dataclasses.replace(begun.tokenizer, fingerprint="e" * 64)
        ),
        "another version of phi4": msgspec.structs.replace(begun, format_version=1),
    }
    for message, plan in changed.items():
        assert message in refused(plan)
    before = rows.stat().st_mtime_ns
    os.utime(rows, ns=(0, 10**18))
    remedy = refused(plan_of(config, rows)).partition("`")[2].partition("`")[0]
    subprocess.run(shlex.split(remedy), check=True)
    assert rows.stat().st_mtime_ns == before
    tokenize(plan_of(config, rows), tmp_path / "p", config, shard=(1, 2))


def test_job_that_comes_after_the_merge_has_nothing_to_do(
    config: TokenizerConfig, rows: Path, tmp_path: Path
) -> None:
    prefix, plan = tmp_path / "p", plan_of(config, rows)
    assert not is_finished(plan, prefix)
    tokenize(plan, prefix, config)
    shutil.copytree(work_directory(prefix), tmp_path / "saved")
    manifest = merge_runs(prefix)
    assert is_finished(plan, prefix) and merge_runs(prefix) == manifest
    # Killed while it removed the work directory.
    (tmp_path / "saved").rename(work_directory(prefix))
    assert is_finished(plan, prefix) and not work_directory(prefix).exists()
    # A plan that an aborted job of another corpus began is not its to remove.
    other = plan_of(config, write_rows(tmp_path / "other.jsonl", "dog"))
    tokenize(other, prefix, config, shard=(0, 2))
    assert is_finished(plan, prefix) and work_directory(prefix).exists()


def finish(plan: TokenizePlan, prefix: Path, config: TokenizerConfig) -> None:
    if not is_finished(plan, prefix):
        tokenize(plan, prefix, config)
        merge_runs(prefix)


def test_killed_at_any_rename_or_removal_it_goes_on(
    config: TokenizerConfig, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each process dies without a last word at its n-th step; the next one finishes the work."""
    plan, prefix = plan_of(config, rows, part_bytes=1500), tmp_path / "p"
    finish(plan, tmp_path / "whole", config)
    steps = {name: getattr(os, name) for name in ("replace", "unlink", "rmdir")}

    def die_at(count: int) -> None:
        left = iter(range(count))

        def step(name: str, *arguments: object, **options: object) -> None:
            if next(left, None) is None:
                os._exit(9)
            steps[name](*arguments, **options)

        for name in steps:
            monkeypatch.setattr(os, name, functools.partial(step, name))

    for count in itertools.count():
        child = os.fork()
        if not child:
            die_at(count)
            finish(plan, prefix, config)
            os._exit(0)
        killed = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        finish(plan, prefix, config)
        assert not [name for name in names(tmp_path) if "work" in name or ".bin.partial" in name]
        for suffix in ("bin", "idx", "manifest.json"):
            assert Path(f"{prefix}.{suffix}").read_bytes() == (
                Path(f"{tmp_path}/whole.{suffix}").read_bytes()
            )
        if not killed:
            break
        for path in tmp_path.glob("p.*"):
            path.unlink()
    assert count > 20


def test_pair_of_another_corpus_is_replaced_only_on_demand(
    config: TokenizerConfig, rows: Path, tmp_path: Path
) -> None:
    prefix, plan = tmp_path / "p", plan_of(config, rows)
    other = plan_of(config, write_rows(tmp_path / "other.jsonl", "dog"))
    tokenize(plan, prefix, config)
    merge_runs(prefix)
    with pytest.raises(
        DataError, match=r"with .*rows\.jsonl, without .*other\.jsonl; .*--overwrite"
    ):
        is_finished(other, prefix)
    assert not is_finished(other, prefix, overwrite=True)
    tokenize(other, prefix, config)
    assert not is_finished(other, prefix)  # begun: no second --overwrite is needed
    merge_runs(prefix)
    assert is_finished(other, prefix)
    with pytest.raises(DataError, match="--overwrite"):
        is_finished(plan, prefix)


def test_pair_of_another_tool_is_not_replaced_unasked(
    config: TokenizerConfig, rows: Path, tmp_path: Path
) -> None:
    (tmp_path / "p.idx").write_bytes(b"megatron's")
    with pytest.raises(DataError, match=r"p\.idx exists and was not made by this plan"):
        is_finished(plan_of(config, rows), tmp_path / "p")


@pytest.mark.parametrize("name", ["web/", ".", "web/..", "web.list"])
def test_prefix_that_names_no_pair_is_refused(
    config: TokenizerConfig, rows: Path, tmp_path: Path, name: str
) -> None:
    before = names(tmp_path)
    for write in (
        lambda prefix: tokenize(plan_of(config, rows), prefix, config),
        lambda prefix: TokenFileWriter(prefix, load_tokenizer(config).facts).__enter__(),
    ):
        with pytest.raises(DataError, match=r"is a directory|is interpreted as a list"):
            write(f"{tmp_path}/{name}")
    assert names(tmp_path) == before


def test_second_merge_at_the_same_time_is_one_line(
    config: TokenizerConfig, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefix = tmp_path / "p"
    tokenize(plan_of(config, rows), prefix, config)
    ranges = token_merge._sorted_ranges

    def with_a_second_merge(*arguments: object):
        yield from ranges(*arguments)
        with monkeypatch.context() as patch:
            patch.setattr(token_merge, "_sorted_ranges", ranges)
            with pytest.raises(DataError, match=r"p\.bin is being written by another process"):
                merge_runs(prefix)

    monkeypatch.setattr(token_merge, "_sorted_ranges", with_a_second_merge)
    assert merge_runs(prefix) == TokenFile(prefix).verify()


def test_work_that_vanishes_is_one_line(
    config: TokenizerConfig, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefix, plan = tmp_path / "p", plan_of(config, rows)
    with pytest.raises(DataError, match=r"is gone: another job finished .*phi4 data verify"):
        tokenize(plan, prefix, config, lambda progress: shutil.rmtree(work_directory(prefix)))
    tokenize(plan, prefix, config)
    next(work_directory(prefix).glob("*.tokens")).unlink()
    with pytest.raises(DataError, match=r"\.tokens is gone"):
        merge_runs(prefix)


def test_leftovers_of_a_killed_merge_go_with_the_next(
    config: TokenizerConfig, rows: Path, tmp_path: Path
) -> None:
    prefix = tmp_path / "p[1]"
    tokenize(plan_of(config, rows), prefix, config)
    left = Path(f"{prefix}.bin.partial-0123456789ab")
    left.write_bytes(b"half")
    merge_runs(prefix)
    assert not left.exists() and TokenFile(prefix).verify()


def test_leftovers_stay_where_locks_do_not_exist(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSYS, "no locks")

    monkeypatch.setattr(fcntl, "flock", refuse)
    left = tmp_path / "x.bin.partial-0123456789ab"
    left.write_bytes(b"perhaps alive")
    file = HashedFile(f"{tmp_path}/x.bin")
    file.write(b"content")
    file.finish()
    file.publish()
    assert left.exists() and (tmp_path / "x.bin").read_bytes() == b"content"


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_full_disk_names_file_and_bytes_and_leaves_nothing(
    facts: TokenizerFacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def refuse(stream: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(atomic_files, "_sync_and_close", refuse)
    with pytest.raises(DiskFullError, match=r"x\.keys: writing 7 bytes: .* are free in") as caught:
        write_atomically(tmp_path / "x.keys", b"content")
    assert caught.value.exit_code == 4 and "\n" not in str(caught.value)
    with pytest.raises(DiskFullError, match=r"x\.bin: writing"):  # noqa: SIM117
        with TokenFileWriter(tmp_path / "x", facts) as writer:
            writer.add(np.array([1, 2]))
    assert not names(tmp_path)
