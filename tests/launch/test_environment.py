"""The three launch conventions, and Slurm's node lists against a compressor of the test's own."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phi4.errors import PlatformError
from phi4.launch import (
    WorkerEnvironment,
    expand_nodelist,
    launched_by,
    started_by,
    worker_environment,
)
from phi4.rundir.launched_by import LaunchedBy

TORCHRUN = {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "MASTER_ADDR": "a"}
SRUN = {
    "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1",
    "SLURM_NTASKS": "16",
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "0",
    "SLURM_JOB_NODELIST": "login,gpu[08-11]",
    "SLURM_STEP_NODELIST": "gpu[09-10,08]",
}


def test_own_launcher_meets_in_a_directory():
    environ = {**TORCHRUN, "PHI4_RENDEZVOUS": "/tmp/x"}
    assert started_by(environ) == "phi4"
    assert worker_environment(environ) == WorkerEnvironment(5, 1, 8, "directory", "/tmp/x")


def test_own_launcher_tells_whose_lease_it_holds():
    environ = {**TORCHRUN, "PHI4_RENDEZVOUS": "/tmp/x", "PHI4_ATTEMPT": "3", "SLURM_JOB_ID": "47"}
    worker = worker_environment(environ)
    assert (worker.attempt, worker.job) == (3, "47")


def test_a_task_of_an_array_is_a_job_of_its_own() -> None:
    """SLURM_JOB_ID of one of its tasks is the id of the array."""
    task = {"SLURM_ARRAY_JOB_ID": "40", "SLURM_ARRAY_TASK_ID": "3"}
    environ = {**TORCHRUN, "SLURM_JOB_ID": "40", **task}
    assert worker_environment(environ).job == "40_3"


def test_torchrun_wins_over_srun_and_keeps_its_own_store():
    environ = {**SRUN, **TORCHRUN}
    assert started_by(environ) == "torchrun"
    assert worker_environment(environ) == WorkerEnvironment(5, 1, 8, "env", "env://", "4711")


def test_srun_meets_at_the_first_host_of_the_step():
    assert started_by(SRUN) == "slurm"
    worker = worker_environment(SRUN)
    assert (worker.rank, worker.local_rank, worker.world_size) == (9, 1, 16)
    assert worker.address.startswith("tcp://gpu09:")


def test_slurm_facts_and_node_of_every_launcher():
    job = {"SLURM_JOB_ID": "4711", "SLURM_ARRAY_TASK_ID": "3", "SLURM_RESTART_COUNT": ""}
    assert launched_by({}) == LaunchedBy()
    assert launched_by(job) == LaunchedBy({"job_id": "4711", "array_task_id": "3"})
    assert launched_by(job).job == "4711"
    own = launched_by({**TORCHRUN, "PHI4_RENDEZVOUS": "/tmp/x", "GROUP_RANK": "7"})
    assert (own.node, own.local_rank, own.job) == (0, 1, "")
    torchrun = launched_by({**TORCHRUN, "GROUP_RANK": "2"})
    assert (torchrun.node, torchrun.local_rank) == (2, 1)
    srun = launched_by({**SRUN, "SLURM_NODEID": "4"})
    assert (srun.node, srun.local_rank) == (4, 1)
    assert srun.slurm == {"job_id": "4711", "nodelist": "login,gpu[08-11]"}


def test_srun_ports_are_shared_by_a_step_and_differ_between_steps():
    def address(**changes: str) -> str:
        return worker_environment({**SRUN, **changes}).address

    def ports(**changes: str) -> list[int]:
        place, _, _ = address(**changes).removeprefix("tcp://gpu09:").partition("/")
        return [int(port) for port in place.split(",")]

    assert address() == address(SLURM_PROCID="3", SLURM_LOCALID="0")
    assert address().endswith("/4711.0") and address(SLURM_STEP_ID="1").endswith("/4711.1")
    assert len({*ports(), *ports(SLURM_JOB_ID="4712"), *ports(SLURM_STEP_ID="1")}) == 12
    # Linux hands out 32768 and above to outgoing connections.
    assert all(1024 < p < 32768 for job in range(200) for p in ports(SLURM_JOB_ID=str(job)))


def test_srun_address_can_be_named():
    environ = {**SRUN, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "1234"}
    assert worker_environment(environ).address == "tcp://10.0.0.1:1234/4711.0"


def test_srun_knows_the_host_of_every_rank():
    tasks = {"SLURM_STEP_TASKS_PER_NODE": "6(x2),4"}
    hosts = ("gpu09",) * 6 + ("gpu10",) * 6 + ("gpu08",) * 4
    assert worker_environment({**SRUN, **tasks}).hosts == hosts


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"SLURM_STEP_TASKS_PER_NODE": "8(x2)"},  # another number of nodes
        {"SLURM_STEP_TASKS_PER_NODE": "6(x3)"},  # another number of tasks
        {"SLURM_STEP_TASKS_PER_NODE": "6(x2),4", "SLURM_DISTRIBUTION": "cyclic"},
    ],
)
def test_no_host_is_better_than_a_wrong_one(changes):
    assert worker_environment({**SRUN, **changes}).hosts == ()


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {**SRUN, "SLURM_NTASKS": "1"},
        {**SRUN, "SLURM_STEP_NUM_TASKS": "1"},
        {key: value for key, value in SRUN.items() if key != "SLURM_STEP_ID"},  # sbatch script
        {**SRUN, "SLURM_STEP_ID": str(0xFFFFFFFA)},  # salloc's shell
    ],
)
def test_single_process_is_nobodys_worker(environ):
    assert started_by(environ) is None
    job = environ.get("SLURM_JOB_ID", "")
    assert worker_environment(environ) == WorkerEnvironment(0, 0, 1, "none", "", job)


@pytest.mark.parametrize(
    ("environ", "named"),
    [
        ({**TORCHRUN, "RANK": "x"}, "RANK is 'x'"),
        ({"RANK": "0", "WORLD_SIZE": "1"}, "LOCAL_RANK is not set"),
        ({**TORCHRUN, "RANK": "8"}, "rank 8 is outside the world of 8"),
        ({**SRUN, "SLURM_STEP_NODELIST": "gpu[1-"}, "gpu[1-"),
        ({"SLURM_PROCID": "0", "SLURM_STEP_ID": "0"}, "SLURM_NTASKS is not set"),
    ],
)
def test_contradicting_variables_are_refused_by_name(environ, named):
    with pytest.raises(PlatformError) as caught:
        worker_environment(environ)
    assert named in str(caught.value)


def test_srun_without_a_node_list_is_refused():
    environ = {key: value for key, value in SRUN.items() if "NODELIST" not in key}
    with pytest.raises(PlatformError, match="MASTER_ADDR"):
        worker_environment(environ)


names = st.from_regex(r"[a-z][a-z0-9.-]{0,5}[a-z]", fullmatch=True)
runs = st.tuples(st.integers(0, 120), st.integers(0, 12), st.integers(1, 4))


@given(st.lists(st.tuples(names, st.lists(runs, max_size=3), st.sampled_from(["", "-ib"]))))
def test_node_list_expands_to_what_was_compressed(groups):
    parts, hosts = [], []
    for name, ranges, tail in groups:
        if not ranges:
            parts.append(name + tail)
            hosts.append(name + tail)
            continue
        items = []
        for first, length, width in ranges:
            span = f"{first:0{width}d}-{first + length:0{width}d}"
            items.append(span if length else f"{first:0{width}d}")
            hosts += [f"{name}{n:0{width}d}{tail}" for n in range(first, first + length + 1)]
        parts.append(f"{name}[{','.join(items)}]{tail}")
    if parts:
        assert expand_nodelist(",".join(parts)) == hosts


def test_node_list_with_two_brackets_runs_through_the_last_first():
    assert expand_nodelist("r[1-2]n[09-10]") == ["r1n09", "r1n10", "r2n09", "r2n10"]


@pytest.mark.parametrize("text", ["", "a,", "n[1-2", "n]1[", "n[a-b]", "n[]", "a b"])
def test_text_that_is_no_node_list_is_refused(text):
    with pytest.raises(PlatformError, match="node list"):
        expand_nodelist(text)
