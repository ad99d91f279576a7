"""A private Slurm for the tests of this directory, and a job on it."""

import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from phi4.launch.slurm import NodeRange, Setting, SlurmRequest, script_text
from phi4.launch.slurm.clients import JobState, job_state
from phi4.rundir.names import SLURM_DIR
from tests.support.waiting import wait_until
from tools.slurm_cluster import SlurmCluster, slurm_cluster

STAND_IN = Path(__file__).with_name("stand_in.py")


@pytest.fixture(scope="session")
def cluster() -> Iterator[SlurmCluster]:
    """Two idle nodes."""
    if shutil.which("slurmctld", path="/usr/sbin:/usr/bin") is None:
        pytest.skip("slurmctld is missing: apt-get install slurmctld slurmd slurm-client munge")
    # Short, because sockets have their names in it; munge wants that all may enter.
    with tempfile.TemporaryDirectory(prefix="slurm") as place:
        Path(place).chmod(0o711)
        with slurm_cluster(Path(place) / "c") as running:
            yield running
        assert running.members() == []


class Job:
    """A job that runs the stand-in."""

    def __init__(self, cluster: SlurmCluster, run_dir: Path, request: SlurmRequest) -> None:
        self.cluster, self.run_dir, self.request = cluster, run_dir, request
        script = run_dir / "job.sh"
        script.write_text(script_text(request))
        self.number = cluster.call("sbatch", "--parsable", str(script)).strip()

    @property
    def state(self) -> JobState:
        """What Slurm says of it now."""
        state = job_state(self.number)
        assert state is not None
        return state

    def ended(self) -> JobState:
        """Its state once it has ended for good."""

        def end() -> JobState | None:
            state = self.state
            return None if state.is_active else state

        return wait_until(end, f"the end of job {self.number}")

    def output(self) -> str:
        """What the script said."""
        path = self.run_dir / SLURM_DIR / f"{self.number}.out"
        return path.read_text() if path.exists() else ""

    def wait_for_step(self, step: int, *, attempt: int = 0, rank: int = 0) -> None:
        """Until a rank of an attempt has printed a step."""
        log = self.run_dir / SLURM_DIR / f"{self.number}.{attempt}" / f"rank_{rank}.log"

        def is_there() -> bool:
            return log.exists() and f"step {step}\n" in log.read_text()

        wait_until(is_there, f"step {step} in {log}")


@pytest.fixture
def submit(cluster: SlurmCluster, tmp_path: Path) -> Iterator[Callable[..., Job]]:
    """Submit a job of two ranks on two nodes.

    Keywords: steps, every and faults of the stand-in; the others are fields of `SlurmRequest`.
    """
    jobs: list[Job] = []

    def submitted(*, steps: int, every: int, faults: dict | None = None, **fields: Any) -> Job:
        (tmp_path / SLURM_DIR).mkdir()
        if faults:
            (tmp_path / "faults.json").write_bytes(msgspec.json.encode(faults))
        words = (sys.executable, str(STAND_IN), str(tmp_path), str(steps), str(every))
        request = SlurmRequest(
            written_by="a test",
            run_dir=str(tmp_path),
            last_step=steps,
            command=words,
            time_limit="30",
            **{
                "nodes": NodeRange(2, 2),
                "tasks_per_node": 1,
                "settings": _SETTINGS,
                **fields,
            },
        )
        jobs.append(Job(cluster, tmp_path, request))
        return jobs[-1]

    yield submitted
    for job in jobs:
        cluster.call("scancel", job.number)
        job.ended()


_SETTINGS = (Setting("OMP_NUM_THREADS", "1", "Two cores."),)
