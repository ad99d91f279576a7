"""One command, any number of ranks: the same call starts the workers and is the workers.

`phi4 train RECIPE` typed by a user starts `num_workers` copies of itself; a copy, or a process that
torchrun or srun started, joins the others and runs the body.
"""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from phi4.errors import LayoutError
from phi4.launch.environment import WorkerEnvironment, started_by, worker_environment
from phi4.launch.local import run_workers
from phi4.launch.worker import report_errors

if TYPE_CHECKING:
    from phi4.engine.platform import Platform


def on_ranks(
    argv: Sequence[str],
    body: Callable[[WorkerEnvironment], None],
    *,
    num_workers: int,
    work_dir: Path,
) -> int:
    """Run `body` on every rank; in the process that the user started, wait for them all.

    Args:
        argv: arguments that make `phi4` call this function again, for the workers.
        body: the work of one rank.
        num_workers: processes to start here; ignored where torchrun or srun started them.
        work_dir: takes the workers' logs.

    Returns:
        Exit code; 0 when all ranks returned.

    Raises:
        LayoutError: torchrun or srun started one process for a layout of several.
    """
    starter = started_by(os.environ)
    if starter is None and num_workers > 1:
        return run_workers(argv, num_workers=num_workers, work_dir=work_dir)
    worker = worker_environment(os.environ)
    if starter == "torchrun" and worker.world_size == 1 < num_workers:
        raise LayoutError(
            f"torchrun started one process, the layout needs {num_workers}; "
            f"use --nproc-per-node so that all nodes make {num_workers}"
        )
    # No op of ours goes through torch.compile here, and importing it costs every rank two seconds.
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    # Sequence parallelism wants the gathers queued before the products on Hopper.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    with report_errors():
        body(worker)
    return 0


def join(
    worker: WorkerEnvironment, kind: Literal["auto", "cpu", "cuda"], threads: int
) -> "Platform":
    """Join the other ranks of the run.

    Raises:
        PlatformError: as `phi4.engine.platform.connect`.

    Collectives: creates the default process group over all ranks.
    """
    from phi4.engine.platform import connect

    return connect(
        kind,
        rank=worker.rank,
        local_rank=worker.local_rank,
        world_size=worker.world_size,
        rendezvous=worker.address,
        threads=threads,
    )


def ranks_per_host(worker: WorkerEnvironment) -> int:
    """Processes of this run on this machine, as far as the launcher told."""
    for key in ("LOCAL_WORLD_SIZE", "SLURM_NTASKS_PER_NODE"):
        if os.environ.get(key, "").isdecimal():
            return int(os.environ[key])
    return worker.world_size
