"""`phi4 launch preflight` as a user types it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.commands import command
from tests.support.ranks import RankPool
from tests.support.waiting import LONG_SECONDS


def test_one_process_gets_its_table(copy: Path) -> None:
    with RankPool(1) as pool:
        ended = command(pool, "launch", "preflight", copy / "recipe.toml", f"run.dir={copy / 'x'}")
    assert ended.code == 0, ended.err
    assert "TFLOP/s" in ended.out and "preflight: nothing is wrong" in ended.out
    assert not (copy / "x").exists()


OTHER_PACKAGE = """
import os
from importlib import metadata
version = metadata.version
if os.environ.get("RANK") == "1":
    metadata.version = lambda name: "0.0.1" if name == "msgspec" else version(name)
"""


@pytest.mark.slow
def test_rank_with_another_package_is_named_and_nothing_is_built(copy: Path) -> None:
    (copy / "sitecustomize.py").write_text(OTHER_PACKAGE)
    environment = {**os.environ, "PYTHONPATH": f"{copy}:{os.environ.get('PYTHONPATH', '')}"}
    recipe = ("recipe.toml", "run.dir=other", "parallel.pipeline=2")
    result = subprocess.run(
        [sys.executable, "-m", "phi4", "train", *recipe],
        cwd=copy,
        env=environment,
        capture_output=True,
        text=True,
        timeout=LONG_SECONDS,
    )
    assert result.returncode == 2, result.stderr
    assert "packages differs from that of most ranks" in result.stderr
    assert "on rank 1 on " in result.stderr and "msgspec 0.0.1" in result.stderr
    assert "layout:" not in result.stdout and not (copy / "other/checkpoints").exists()
