"""Some of the mutants of tools/checkpoint_fuzz.py, and that its watch sees what it watches for."""

import pickle
import sys
from pathlib import Path

import pytest

from tests.support.hostile import Bomb
from tests.support.ranks import RankPool
from tools.checkpoint_fuzz import FuzzReport, Watch, fuzz

MUTANTS = 40


def _fuzz(rank: int, world_size: int, root: Path) -> FuzzReport:
    return fuzz(MUTANTS, 1, root)


def _watched(rank: int, world_size: int, root: Path) -> list[str]:
    """Events of a pickle that executes something, and of a harmless one."""
    watch = Watch()
    sys.addaudithook(watch.hook)
    with watch.listening():
        pickle.loads(pickle.dumps([1, "a"]))
        assert not watch.seen
        pickle.loads(pickle.dumps(Bomb(root / "marker")))
    return watch.seen


@pytest.fixture(scope="module")
def pool():
    """One rank: a hook stays in the process that adds it."""
    with RankPool(1) as ranks:
        yield ranks


def test_watch_sees_a_pickle_that_executes(pool: RankPool, tmp_path: Path) -> None:
    events = [event.split()[0] for event in pool.run(_watched, tmp_path)[0]]
    assert events == ["pickle.find_class", "os.system"]
    assert (tmp_path / "marker").exists()


def test_mutants_execute_nothing_and_end_in_one_line(pool: RankPool, tmp_path: Path) -> None:
    report = pool.run(_fuzz, tmp_path)[0]
    assert not report.executed and not report.unclear
    assert sum(report.kinds.values()) == MUTANTS == sum(report.outcomes.values())
    assert set(report.outcomes) <= {"CheckpointError", "ConfigError", "loaded"}
    # Not all of them are found by the first check.
    assert report.outcomes["CheckpointError"] > MUTANTS // 2
