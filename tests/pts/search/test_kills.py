"""A search that is killed, at any moment, goes on and ends as if it had not been."""

import json
import random
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import pytest

from phi4.pts.search.store import FILE_NAME
from tests.support.waiting import LONG_SECONDS

FILES = ("pivots.jsonl", "trajectories.jsonl")


class Attempt(NamedTuple):
    """What a process asked for and was answered, blocks by the seed of their request."""

    asked: dict[int, int]
    drawn: dict[int, dict[int, list[int]]]
    num_lines: int


def attempt(directory: Path, log: Path, kill_at: int) -> Attempt:
    words = [sys.executable, "-m", "tests.pts.search.killed_search", directory, log, str(kill_at)]
    ended = subprocess.run(words, timeout=LONG_SECONDS, capture_output=True, text=True)
    assert ended.returncode == (-signal.SIGKILL if kill_at else 0), ended.stderr
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    asked = {line["asked"][3]: line["n"] for line in lines if "asked" in line}
    assert len(asked) == sum("asked" in line for line in lines), "a block was asked for twice"
    drawn: dict[int, dict[int, list[int]]] = {}
    for line in lines:
        if "drawn" in line:
            drawn.setdefault(line["drawn"][3], {})[line["sample"]] = line["ids"]
    return Attempt(asked, drawn, len(lines))


def stored_seeds(directory: Path) -> set[int]:
    if not (directory / FILE_NAME).exists():
        return set()
    with closing(sqlite3.connect(directory / FILE_NAME)) as store:
        is_there = store.execute("SELECT 1 FROM sqlite_master WHERE name='blocks'").fetchall()
        return {seed for (seed,) in store.execute("SELECT seed FROM blocks")} if is_there else set()


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory) -> Iterator[tuple[Path, Attempt]]:
    directory = tmp_path_factory.mktemp("unbroken")
    yield directory, attempt(directory, directory / "log", 0)


def check_killed_run(directory: Path, unbroken: tuple[Path, Attempt], kills: list[int]) -> None:
    expected_directory, whole = unbroken
    stored: set[int] = set()
    for number, kill_at in enumerate([*kills, 0]):
        found = attempt(directory, directory / f"log{number}", kill_at)
        assert not stored & set(found.asked), "a stored block was drawn again"
        for seed, samples in found.drawn.items():
            for sample, ids in samples.items():
                assert whole.drawn[seed][sample] == ids
        assert found.asked.items() <= whole.asked.items()
        stored = stored_seeds(directory)
    assert stored == set(whole.asked)
    for name in FILES:
        assert (directory / name).read_bytes() == (expected_directory / name).read_bytes()
    assert (directory / FILES[0]).stat().st_size > 0


def test_search_killed_twice_ends_as_an_unbroken_one(tmp_path, unbroken) -> None:
    num_lines = unbroken[1].num_lines
    # In the screen, and among the confirmations.
    check_killed_run(tmp_path, unbroken, [5, num_lines * 2 // 3])


@pytest.mark.slow
def test_search_killed_at_twenty_points_ends_as_an_unbroken_one(tmp_path, unbroken) -> None:
    rng = random.Random(20)
    for number in range(20):
        directory = tmp_path / str(number)
        directory.mkdir()
        check_killed_run(directory, unbroken, [rng.randrange(1, unbroken[1].num_lines)])
