"""The script's decisions on a real Slurm, with a program that only keeps the exit-code contract."""

import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from phi4.errors import ConfigError
from phi4.launch.slurm import NodeRange, SlurmRequest, require_partition
from phi4.launch.slurm.jobs import attempts
from tests.launch.slurm.conftest import Job
from tools.slurm_cluster import SlurmCluster

pytestmark = pytest.mark.slurm

VENV = f"PATH={shlex.quote(str(Path(sys.executable).parent))}:$PATH"


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"partition": "nowhere"}, "partition 'nowhere' does not exist; use high or low"),
        ({"nodes": NodeRange(3, 3)}, "--nodes=3 is more than the 2 nodes of partition low"),
    ],
)
def test_what_the_cluster_does_not_have_is_refused(
    cluster: SlurmCluster, asked: dict, message: str
) -> None:
    request = SlurmRequest(
        written_by="a test",
        run_dir="run",
        last_step=1,
        command=("true",),
        tasks_per_node=1,
        **{"nodes": NodeRange(2, 2), **asked},
    )
    with pytest.raises(ConfigError, match=re.escape(message)):
        require_partition(request)


@pytest.mark.parametrize("starter", ["srun", "torchrun"])
def test_a_notice_saves_requeues_and_finishes(
    submit: Callable[..., Job], cluster: SlurmCluster, starter: str
) -> None:
    """No step is lost, and the job is COMPLETED only at its last step."""
    job = submit(steps=60, every=1000, starter=starter, setup=VENV)
    job.wait_for_step(3)
    cluster.call("scancel", "--batch", "--signal=USR1", job.number)
    state = job.ended()
    assert (state.state, state.exit_code, state.restarts) == ("COMPLETED", "0:0", 1)
    first, second = attempts(job.run_dir)
    assert (first.end.code, first.end.then) == (5, "requeue")
    assert first.end.step == second.start.step >= 3
    assert second.end.step == 60
    assert (job.run_dir / "preempted").read_text() == "True"


def test_a_range_takes_what_is_there_and_shrinks(
    submit: Callable[..., Job], cluster: SlurmCluster
) -> None:
    """One task per node: Slurm would give a job of one task one node, whatever the range says."""
    job = submit(steps=60, every=1000, nodes=NodeRange(1, 2))
    job.wait_for_step(3)
    cluster.call("scontrol", "update", "NodeName=n2", "State=DRAIN", "Reason=test")
    try:
        cluster.call("scancel", "--batch", "--signal=USR1", job.number)
        assert job.ended().state == "COMPLETED"
    finally:
        cluster.call("scontrol", "update", "NodeName=n2", "State=RESUME")
    assert [attempt.start.nodes for attempt in attempts(job.run_dir)] == ["n[1-2]", "n1"]
    assert not (job.run_dir / "slurm" / f"{job.number}.1" / "rank_1.log").exists()


@pytest.mark.parametrize(
    ("faults", "code"),
    [
        # The other rank says 5, because srun tells it to end.
        ({"1": {"step": 3, "do": "exit 6"}}, 6),
        ({"1": {"step": 3, "do": "traceback"}}, 1),
        ({"0": {"step": 3, "do": "exit 4"}, "1": {"step": 3, "do": "lost"}}, 4),
    ],
)
def test_what_would_fail_again_fails(submit: Callable[..., Job], faults: dict, code: int) -> None:
    """With the code of the rank that is to blame, and without a requeue."""
    job = submit(steps=50, every=10, faults={"0": faults})
    state = job.ended()
    assert (state.state, state.exit_code, state.restarts) == ("FAILED", f"{code}:0", 0)


def test_a_killed_rank_is_requeued_until_no_attempt_brings_progress(
    submit: Callable[..., Job],
) -> None:
    """The first failure has brought a checkpoint, so it does not count."""
    killed = {"0": {"step": 12, "do": "lost"}, "1": {"step": 12, "do": "kill"}}
    faults = {"0": killed, "1": {"0": {"step": 15, "do": "exit 7"}}, "2": killed}
    job = submit(steps=50, every=10, faults=faults, max_retries=1)
    state = job.ended()
    assert (state.state, state.exit_code) == ("FAILED", "137:0")
    ends = [attempt.end for attempt in attempts(job.run_dir)]
    assert [(end.code, end.then, end.step) for end in ends] == [
        (137, "requeue", 10),
        (7, "requeue", 10),
        (137, "end", 10),
    ]
    assert "2 failures in a row without a newer checkpoint" in job.output()


def test_a_run_without_the_time_to_save_is_requeued_and_finishes(
    submit: Callable[..., Job], cluster: SlurmCluster
) -> None:
    """As after a preemption without a grace time: srun ends with 0 before Slurm kills the ranks."""
    stays = {"step": 3, "do": "stay"}
    with cluster.kill_wait(0):
        job = submit(steps=10, every=2, faults={"0": {"0": stays, "1": stays}})
        for rank in (0, 1):
            job.wait_for_step(3, rank=rank)
        cluster.call("scontrol", "requeue", job.number)
        state = job.ended()
    assert (state.state, state.restarts) == ("COMPLETED", 1), job.output()
    assert [attempt.start.step for attempt in attempts(job.run_dir)] == [0, 2]


def test_a_cancelled_job_saves_and_stays_cancelled(
    submit: Callable[..., Job], cluster: SlurmCluster
) -> None:
    """Although its ranks end with the code that asks for a requeue."""
    job = submit(steps=1000, every=1000)
    job.wait_for_step(3)
    cluster.call("scancel", job.number)
    assert job.ended().state == "CANCELLED"
    assert (job.run_dir / "checkpoints" / "latest").exists()
    assert job.state.restarts == 0
    assert (job.run_dir / "preempted").read_text() == "False"


def test_a_preempted_job_knows_that_it_was(submit: Callable[..., Job]) -> None:
    """Slurm says so while it takes the job's nodes away."""
    job = submit(steps=200, every=1000)
    job.wait_for_step(3)
    words = "--partition=high --nodes=2 --exclusive --time=1 --output=/dev/null --wrap true"
    job.cluster.call("sbatch", *words.split())
    assert job.ended().state == "COMPLETED"
    assert (job.run_dir / "preempted").read_text() == "True"


def test_a_run_that_ends_early_by_request_is_not_completed(submit: Callable[..., Job]) -> None:
    """A file stop, a hook: exit code 0 before run.steps."""
    job = submit(steps=1000, every=1)
    job.wait_for_step(3)
    (job.run_dir / "stop").touch()
    assert job.ended().state == "CANCELLED"
