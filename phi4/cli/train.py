"""`phi4 train`."""

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from phi4.config import Recipe, check, load_recipe
from phi4.launch import (
    WorkerEnvironment,
    join,
    launched_by,
    on_ranks,
    save_and_end,
    take_notices,
)
from phi4.launch.notices import StopPlan
from phi4.launch.slurm.clients import was_preempted
from phi4.stages import require_gate, require_stage, stage_of

RecipePath = Annotated[Path, typer.Argument(help="A .toml recipe.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="section.key=value, for example parallel.tensor=2.")
]


def train(
    recipe_path: RecipePath,
    overrides: Overrides = None,
    change: Annotated[
        bool,
        typer.Option(
            "--change", help="Allow changed schedule keys (see `phi4 recipe keys`) on resume."
        ),
    ] = False,
    no_gate: Annotated[
        bool,
        typer.Option(
            "--no-gate", help="Skip the start gate of DPO, the checks before the first step."
        ),
    ] = False,
) -> None:
    """Train a recipe on this machine's processes, or as one rank of torchrun or srun.

    A run resumes from its newest checkpoint. A new run takes its weights from run.init_from and its
    data ledger from data.continue_from, if the recipe sets them. The console shows a summary of the
    run at the start, the progress, and the checkpoint at the end.

    On SIGTERM or SIGUSR1, sent to any or all of its processes, the run saves the current step and
    ends with code 5 within reliability.stop_seconds; the same command resumes it. `touch
    RUN_DIR/stop` does the same with code 0. `touch RUN_DIR/save_now` saves and continues. Ctrl-C or
    a second SIGTERM ends the run at once.

    Exit codes: 0 finished, 1 failed, 2 wrong input, 3 another run owns run.dir, 4 disk full,
    5 saved and stopped by a signal, 6 diverged, 7 a rank stopped or hangs, 8 corrupt computation,
    128+S ended by signal S. docs/faults.md says what a job script should do after each.
    """
    overrides = [*(overrides or []), *(["dpo.gate=false"] if no_gate else [])]
    recipe = load_recipe(recipe_path, overrides)
    require_stage(recipe)
    if no_gate:
        require_gate(recipe)
    check(recipe)
    parallel = recipe.parallel
    argv = ["train", str(recipe_path), *overrides, *(["--change"] if change else [])]

    stop = save_and_end(recipe.reliability.stop_seconds)
    num_workers = parallel.model_parallel_size * max(parallel.data, 1)
    run_dir = Path(recipe.run.dir)
    code = on_ranks(
        argv,
        partial(_train_rank, recipe=recipe, stop=stop, allow_change=change),
        num_workers=num_workers,
        work_dir=run_dir,
        owns_work_dir=True,
        stop=stop,
        one_queue=parallel.needs_one_queue,
    )
    raise typer.Exit(code)


def _train_rank(
    worker: WorkerEnvironment, *, recipe: Recipe, stop: StopPlan, allow_change: bool
) -> int:
    """One rank's part of the run; returns its exit code."""
    has_launcher = worker.rendezvous == "directory"
    noticed = take_notices(
        None if has_launcher else stop,
        ends_at_second=worker.world_size == 1 and not has_launcher,
    )
    from phi4.engine.platform import disconnect
    from phi4.train.reliability.requests import TORCHRUN_SECONDS, Requests
    from phi4.train.session import run_training

    stage = stage_of(recipe)
    check(recipe, worker.world_size, [stage.violations])
    wait_seconds = recipe.reliability.rendezvous_seconds
    platform = join(worker, recipe.run.platform, recipe.run.threads, wait_seconds)
    ending = run_training(
        recipe,
        platform,
        stage.make_objective(recipe),
        allow_change=allow_change,
        attempt=worker.attempt,
        launched_by=launched_by(),
        hooks=stage.hooks,
        requests=Requests(
            noticed,
            kill_seconds=TORCHRUN_SECONDS if worker.rendezvous == "env" else None,
            was_preempted=partial(was_preempted, worker.job),
        ),
    )
    disconnect()
    return ending.exit_code
