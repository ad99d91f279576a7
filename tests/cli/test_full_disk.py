"""`phi4 train` on a full disk: it goes on, saves once there is space, and says so by exit code."""

import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from unittest.mock import patch

import pytest

from tests.support.in_process import phi4, write_recipe
from tests.support.ranks import RankPool, pool_fixture
from tests.support.runs import command
from tests.support.small_disk import mounted_small_disk
from tests.support.waiting import LONG_SECONDS, wait_until

PREDICTION = "phi4.engine.checkpoint.saving.predicted_bytes"
TOO_MUCH = 1 << 60


def _train(rank: int, world_size: int, root: Path, required: list[int]) -> tuple[int, str]:
    """A run whose saves need so many bytes."""
    with patch(PREDICTION, side_effect=required):
        steps = f"run.steps={len(required)}"
        return phi4(rank, world_size, root, ["train", "recipe.toml", "checkpoint.every=1", steps])


pool = pool_fixture(1)


def test_run_goes_on_and_saves_the_next_step(pool: RankPool, tmp_path: Path) -> None:
    write_recipe(tmp_path)
    code, printed = pool.run(_train, tmp_path, [0, TOO_MUCH, 0])[0]
    assert code == 0, printed
    (line,) = [line for line in printed.splitlines() if "is not saved" in line]
    assert "step 2 is not saved: checkpoint run/checkpoints/step_0000002 needs 1,152,92" in line
    assert line.endswith("training continues and tries again after step 3")
    names = sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir())
    assert names == ["latest", "step_0000001", "step_0000003"]


def test_run_whose_last_step_is_not_saved_has_not_finished(pool: RankPool, tmp_path: Path) -> None:
    write_recipe(tmp_path)
    code, printed = pool.run(_train, tmp_path, [0, TOO_MUCH])[0]
    assert code == 4 and "Traceback" not in printed
    assert printed.splitlines()[-1].startswith("DiskFullError: checkpoint run/checkpoints/step_00")
    code, printed = pool.run(_train, tmp_path, [0, 0])[0]
    assert code == 0 and "resumed from run/checkpoints/step_0000001" in printed


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    with mounted_small_disk(tmp_path / "disk") as place:
        yield place


@pytest.mark.slow
def test_run_on_a_small_disk_goes_on_once_there_is_space(small_disk: Path, tmp_path: Path) -> None:
    write_recipe(tmp_path, f"run.dir={small_disk}/run", "checkpoint.every=1", "checkpoint.keep=1")
    ballast, out = small_disk / "ballast", tmp_path / "out"
    with out.open("w") as stream:
        run = subprocess.Popen(command("run.steps=100"), cwd=tmp_path, stdout=stream, stderr=stream)
        try:
            _wait_for(out, "saved ")
            _wait_for(out, "is not saved: checkpoint", meanwhile=lambda: _fill(small_disk, ballast))
            latest = (small_disk / "run/checkpoints/latest").read_text().strip()
            assert (small_disk / "run/checkpoints" / latest / "manifest.json").is_file()
            ballast.unlink()
            assert run.wait(timeout=LONG_SECONDS) == 0, out.read_text()
        finally:
            run.kill()
            run.wait()
    assert "Traceback" not in out.read_text()
    assert (small_disk / "run/checkpoints/latest").read_text() == "step_0000100\n"


def _fill(disk: Path, ballast: Path) -> None:
    """Leave space for the record of metrics, not for a checkpoint."""
    surplus = shutil.disk_usage(disk).free - (1 << 16)
    with suppress(OSError), ballast.open("ab") as stream:
        stream.write(bytes(max(0, surplus)))


def _wait_for(out: Path, text: str, meanwhile: Callable[[], None] = lambda: None) -> None:
    def is_printed() -> bool:
        meanwhile()
        return text in out.read_text()

    wait_until(is_printed, f"{text!r} from the run")
