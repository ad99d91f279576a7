"""`phi4 sweep`: what it prints of runs that ended, and what it refuses."""

import json
import math
import subprocess
from pathlib import Path

import pytest

from phi4.cli import main
from phi4.launch.sweep import SweepRun
from phi4.rundir import held_lease
from tests.support.sweeps import finish, finish_all, loaded, write_sweep
from tests.support.waiting import LONG_SECONDS

PNG = b"\x89PNG"


def phi4(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `phi4 sweep WORDS`."""
    with pytest.raises(SystemExit) as stop:
        main(["sweep", *map(str, words)])
    return int(stop.value.code or 0), *capsys.readouterr()


def parabola(run: SweepRun) -> float:
    """Lowest at 4e-3 of short runs and 2e-3 of long ones; a little noise by seed and rate."""
    recipe = run.recipe
    optimum = 4e-3 if run.scale == "short" else 2e-3
    wobble = 1e-3 * math.sin(1e5 * recipe.optim.learning_rate * run.seed)
    return 3 + run.seed / 10 + 0.1 * math.log(recipe.optim.learning_rate / optimum) ** 2 + wobble


FIVE_RATES = ("1e-3, 3e-3", "1e-3, 2e-3, 4e-3, 8e-3, 16e-3")


def test_a_table_says_means_differences_and_the_best(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_sweep(tmp_path)
    losses = {1e-3: 3.0, 3e-3: 2.5}
    finish_all(path, lambda r: losses[r.recipe.optim.learning_rate] + 0.1 * r.seed)
    code, out, _ = phi4(capsys, "table", path)
    assert code == 0
    assert "learning_rate=0.003   2.6500* (-0.5000 ± 0.0000)" in out
    assert (tmp_path / "sweep" / "table.png").read_bytes().startswith(PNG)
    _, out, _ = phi4(capsys, "table", path, "--json", "--out", tmp_path / "p.png")
    found = json.loads(out)
    assert found["baseline"] == "learning_rate=0.001" and found["paired"]
    assert [cell["rank"] for cell in found["cells"]] == [2, 2, 1, 1]
    assert (tmp_path / "p.png").exists()


def test_scales_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_sweep(tmp_path, ("seeds", 'analysis = "ranks"\nseeds'), FIVE_RATES)
    finish_all(path, lambda run: run.recipe.optim.learning_rate + 1e-5 * run.seed)
    code, out, _ = phi4(capsys, "table", path)
    assert code == 0 and "short and long   5          1.000 (1.000 to 1.000)" in out
    assert (tmp_path / "sweep" / "ranks.png").read_bytes().startswith(PNG)


def test_learning_rates_are_fitted_and_a_longer_budget_predicted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_sweep(tmp_path, ("seeds", "predict_tokens = 65_536\nseeds"), FIVE_RATES)
    runs = finish_all(path, parabola)
    code, out, _ = phi4(capsys, "table", path, "--analysis", "learning_rate")
    assert code == 0 and "two budgets cannot say whether it is one" in out
    assert f"at 65,536 tokens, {65_536 / runs[-1].tokens:.1f} times the longest budget" in out
    assert (tmp_path / "sweep" / "learning_rate.png").read_bytes().startswith(PNG)
    _, out, _ = phi4(capsys, "table", path, "--analysis", "learning_rate", "--json")
    found = json.loads(out)
    for fit, optimum in zip(found["fits"], (4e-3, 2e-3), strict=True):
        assert fit["low"] < optimum < fit["high"]
    assert found["power_law"]["exponent"] == pytest.approx(-1, abs=0.1)


def test_an_optimum_at_the_edge_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_sweep(tmp_path, FIVE_RATES)
    finish_all(path, lambda run: run.recipe.optim.learning_rate)
    _, out, _ = phi4(capsys, "table", path, "--analysis", "learning_rate")
    assert "lowest at 0.001, the smallest of the grid; add smaller ones" in " ".join(out.split())
    assert "no power law: 0 token budgets" in out


def test_status_and_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_sweep(tmp_path)
    code, _, err = phi4(capsys, "table", path)
    assert code == 2 and "no run of" in err and "phi4 sweep run" in err
    runs = loaded(path)[1]
    for run in runs[:3]:
        finish(run, 2.0)
    _, out, _ = phi4(capsys, "status", path)
    assert "learning_rate=0.001.short.seed_1   finished   4 of 4   0           2.0000" in out
    assert "3 finished, 5 waiting" in out
    _, out, _ = phi4(capsys, "table", path)
    assert "5 runs have not ended and are left out" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--nodes", "2"], "--nodes has no effect without --slurm"),
        ([], "does not exist; create it first"),
        (["--slurm", "--dry-run"], "run learning_rate=0.001.short.seed_1: "),
    ],
)
def test_a_run_is_refused_before_anything_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    code, _, err = phi4(capsys, "run", write_sweep(tmp_path), *words)
    assert code == 2 and message in err
    assert not (tmp_path / "sweep").exists()


def test_one_command_at_a_time(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("phi4.cli.sweep.require_inputs", lambda runs: None)
    path = write_sweep(tmp_path)
    with held_lease(tmp_path / "sweep", job="", say=print):
        code, _, err = phi4(capsys, "run", path)
    assert code == 3 and "is owned by pid" in err


def test_a_finished_sweep_has_nothing_to_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("phi4.cli.sweep.require_inputs", lambda runs: None)
    path = write_sweep(tmp_path)
    finish_all(path, lambda run: 1.0)
    code, _, err = phi4(capsys, "run", path)
    assert code == 0 and "8 runs, 8 have ended, 0 to do" in err
    assert not (tmp_path / "sweep" / "runs.jsonl").exists()


def test_the_script_of_an_array_has_a_task_for_every_run_to_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_sweep(tmp_path)
    runs = loaded(path)[1]
    finish(runs[0], 1.0)
    words = ("--slurm", "--dry-run", "--gpus-per-node", 0, "--jobs", 3, "--time", "1:00:00")
    code, script, _ = phi4(capsys, "run", path, *words)
    assert code == 0 and "#SBATCH --array=0-6%3\n" in script and "@{" not in script
    for run in runs[1:]:
        assert f"    '{run.recipe.run.steps} {run.run_dir}'\n" in script
    assert str(runs[0].run_dir) not in script
    assert '-m phi4 train "$run/slurm/recipe.toml"' in script
    subprocess.run(["bash", "-n"], input=script, text=True, check=True, timeout=LONG_SECONDS)
