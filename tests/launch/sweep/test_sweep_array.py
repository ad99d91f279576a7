"""What one job array cannot do for all runs of a sweep is refused before it is submitted."""

from pathlib import Path

import pytest

from phi4.errors import ConfigError, LayoutError
from phi4.launch.slurm import NodeRange, SlurmRequest
from phi4.launch.sweep import array_request
from tests.support.sweeps import loaded, write_sweep

ASKED = SlurmRequest("phi4 sweep run", "sweep", 0, ("phi4", "train"), NodeRange(1, 1), 1)


def request_for(tmp_path: Path, long: str, **fields: object) -> SlurmRequest:
    """The array of the small sweep, with a key more at its scale `long`."""
    path = write_sweep(tmp_path, ("run.steps = 8", f"run.steps = 8\n{long}"))
    return array_request(SlurmRequest(**{**vars(ASKED), **fields}), loaded(path)[1])


def test_a_task_is_a_run_and_its_steps(tmp_path: Path) -> None:
    made = request_for(tmp_path, "optim.warmup = 2")
    assert [task.last_step for task in made.tasks] == [4] * 4 + [8] * 4
    assert made.tasks[0].run_dir == f"{tmp_path}/sweep/runs/learning_rate=0.001.short.seed_1"
    assert (made.last_step, made.run_dir) == (8, "sweep")
    assert {setting.name for setting in made.settings} >= {"OMP_NUM_THREADS"}


@pytest.mark.parametrize(
    ("long", "fields", "kind", "message"),
    [
        ("run.threads = 2", {}, ConfigError, "differ in run.threads"),
        ("reliability.stop_seconds = 400.0", {}, ConfigError, "=300 is shorter than"),
        ("", {"tasks_per_node": 2}, LayoutError, "run learning_rate=0.001.short.seed_1: "),
    ],
)
def test_what_does_not_fit_is_named(
    tmp_path: Path, long: str, fields: dict, kind: type, message: str
) -> None:
    with pytest.raises(kind, match=message):
        request_for(tmp_path, long, **fields)
