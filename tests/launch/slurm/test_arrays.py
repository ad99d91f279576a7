"""A job array on a real Slurm: each task ends, fails and is requeued by itself."""

import re
import shlex
import sys
from pathlib import Path

import msgspec
import pytest

from phi4.errors import OwnershipError
from phi4.launch.slurm import NodeRange, SlurmRequest, require_idle_array, submit_array
from phi4.launch.slurm.clients import job_state
from phi4.launch.slurm.jobs import attempts, log_paths, status
from phi4.launch.sweep import array_request, progress_of
from tests.launch.slurm.conftest import STAND_IN
from tests.support.sweeps import loaded, write_sweep
from tests.support.waiting import wait_until
from tools.slurm_cluster import SlurmCluster

pytestmark = pytest.mark.slurm

STEPS = 40


def test_tasks_end_fail_and_are_requeued_each_by_itself(
    cluster: SlurmCluster, tmp_path: Path
) -> None:
    """The last one gets the notice: its SLURM_JOB_ID is that of the whole array."""
    runs = loaded(write_sweep(tmp_path, ("run.steps = 4", f"run.steps = {STEPS}")))[1][:3]
    good, bad, noticed = runs
    bad.run_dir.mkdir(parents=True)
    faults = {"0": {"0": {"step": 2, "do": "exit 6"}}}
    (bad.run_dir / "faults.json").write_bytes(msgspec.json.encode(faults))
    stand_in = shlex.join([sys.executable, str(STAND_IN)])
    words = f'exec {stand_in} "$(dirname "$(dirname "$0")")" {STEPS} 1000'
    asked = SlurmRequest(
        written_by="a test",
        run_dir=str(tmp_path / "sweep"),
        last_step=0,
        command=("bash", "-c", words),
        nodes=NodeRange(1, 1),
        tasks_per_node=1,
        time_limit="30",
    )
    array = submit_array(array_request(asked, runs), [run.recipe for run in runs])
    try:
        with pytest.raises(OwnershipError, match=rf"job array {array} of {tmp_path}/sweep has"):
            require_idle_array(str(tmp_path / "sweep"))
        log = noticed.run_dir / "slurm" / f"{array}_2.0" / "rank_0.log"
        wait_until(lambda: log.exists() and "step 3\n" in log.read_text(), "step 3 of a task")
        cluster.call("scancel", "--batch", "--signal=USR1", f"{array}_2")
        wait_until(lambda: _ended(array, len(runs)), "the end of all tasks")
    finally:
        cluster.call("scancel", array)
    states = [job_state(f"{array}_{task}") for task in range(len(runs))]
    assert [state.state for state in states] == ["COMPLETED", "FAILED", "COMPLETED"]
    assert [state.restarts for state in states] == [0, 0, 1]
    assert [[a.end.code for a in attempts(run.run_dir)] for run in runs] == [[0], [6], [5, 0]]
    first, second = attempts(noticed.run_dir)
    assert first.end.step == second.start.step >= 3 and second.end.step == STEPS
    # As the commands of a single job see it.
    assert status(good.run_dir).submission.job == f"{array}_0"
    said = log_paths(good.run_dir, 0)[0].read_text()
    assert re.search(rf"job {array}_0 attempt 0: ends with exit code 0 at step {STEPS}", said)
    assert progress_of(runs, tmp_path / "sweep")[bad.name].status == "diverged"
    require_idle_array(str(tmp_path / "sweep"))


def _ended(array: str, num_tasks: int) -> bool:
    states = [job_state(f"{array}_{task}") for task in range(num_tasks)]
    return all(state is not None and not state.is_active for state in states)
