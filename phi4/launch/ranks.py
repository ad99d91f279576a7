"""Run one function on any number of ranks: the same call starts the workers and runs in them.

A user's `phi4 train RECIPE` starts `num_workers` copies of itself; a copy, or a process that
torchrun or srun started, joins the others and runs the body.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from phi4.errors import LayoutError
from phi4.launch.environment import WorkerEnvironment, started_by, worker_environment
from phi4.launch.local import run_workers
from phi4.launch.notices import StopPlan
from phi4.launch.worker import report_errors
from phi4.rundir import held_lease

if TYPE_CHECKING:
    from phi4.engine.platform import Platform


def on_ranks(
    argv: Sequence[str],
    body: Callable[[WorkerEnvironment], int | None],
    *,
    num_workers: int,
    work_dir: Path,
    owns_work_dir: bool = False,
    stop: StopPlan | None = None,
    interactive: bool = False,
    one_queue: bool = True,
) -> int:
    """Run `body` on every rank; in the process that the user started, wait for all of them.

    Args:
        argv: arguments with which `phi4` calls this function again, in the workers.
        body: the work of one rank; it returns the rank's exit code, with None for 0.
        num_workers: processes to start here; ignored under torchrun or srun.
        work_dir: directory for the workers' logs.
        owns_work_dir: hold the lease of work_dir, a run directory, before anything is written into
            it and until all ranks have ended; the body receives the attempt's number. Under
            torchrun and srun, where no process of ours outlives the ranks, the body has to take the
            lease.
        stop: how the body reacts to notices; None if it does not handle them; see `run_workers`.
        interactive: rank 0 reads stdin and decides what Ctrl-C ends; see `run_workers`.
        one_queue: make a GPU start kernels in the order in which they were queued, as tensor and
            context parallelism need on Hopper; other layouts overlap more without it.

    Returns:
        The exit code; if all ranks returned, theirs.

    Raises:
        LayoutError: torchrun or srun started one process for a layout of several.
        OwnershipError: another run owns work_dir.
    """
    starter = started_by(os.environ)
    worker = worker_environment(os.environ)
    takes_notices = stop is not None
    run = partial(_run_body, body, takes_notices=takes_notices, one_queue=one_queue)
    if starter is None:
        with _owned(work_dir, worker) if owns_work_dir else nullcontext(worker) as owner:
            if num_workers == 1:
                return run(owner)
            env = {} if owner.attempt is None else {"PHI4_ATTEMPT": str(owner.attempt)}
            return run_workers(
                argv,
                num_workers=num_workers,
                work_dir=work_dir,
                env=env,
                stop=stop,
                interactive=interactive,
            )
    if starter == "torchrun" and worker.world_size == 1 < num_workers:
        raise LayoutError(
            f"torchrun started one process, but the layout needs {num_workers}; use "
            f"--nproc-per-node so that all nodes together start {num_workers}"
        )
    return run(worker)


@contextmanager
def _owned(run_dir: Path, worker: WorkerEnvironment) -> Iterator[WorkerEnvironment]:
    with held_lease(run_dir, job=worker.job, say=partial(print, flush=True)) as lease:
        yield replace(worker, attempt=lease.number)


def _run_body(
    body: Callable[[WorkerEnvironment], int | None],
    worker: WorkerEnvironment,
    *,
    takes_notices: bool,
    one_queue: bool,
) -> int:
    # No op of ours is compiled by torch.compile here; a fusion of megatron-core's would be, by
    # every rank at its first call.
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    if one_queue:
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    with report_errors(takes_notices=takes_notices):
        return body(worker) or 0


def join(
    worker: WorkerEnvironment,
    kind: Literal["auto", "cpu", "cuda"],
    threads: int,
    seconds: float = 600.0,
) -> "Platform":
    """Join the other ranks of the run.

    Args:
        worker: this process's place.
        kind: `run.platform`.
        threads: CPU threads of this process.
        seconds: how long to wait for the others.

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
        rendezvous_seconds=seconds,
        expected_hosts=worker.hosts,
    )
