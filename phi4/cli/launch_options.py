"""Options of `phi4 launch slurm`."""

from pathlib import Path
from typing import Annotated

import typer

Nodes = Annotated[
    str,
    typer.Option(
        help="Number of nodes, N or MIN-MAX; with parallel.data=0 a requeued job may get fewer."
    ),
]
Partition = Annotated[str | None, typer.Option(help="sbatch --partition.")]
Account = Annotated[str | None, typer.Option(help="sbatch --account.")]
TimeLimit = Annotated[
    str | None,
    typer.Option(
        "--time", help="Time limit of one attempt, for example 24:00:00; the job is then requeued."
    ),
]
GpusPerNode = Annotated[
    int,
    typer.Option(
        min=0, help="GPUs per node, one rank each; 0 with --tasks-per-node for CPU ranks."
    ),
]
TasksPerNode = Annotated[
    int | None, typer.Option(min=1, help="Ranks per node; by default --gpus-per-node.")
]
CpusPerTask = Annotated[int | None, typer.Option(min=1, help="CPU cores per rank.")]
UseTorchrun = Annotated[
    bool,
    typer.Option(
        "--torchrun/--srun", help="Start ranks by torchrun on each node, or as one Slurm task each."
    ),
]
SignalSeconds = Annotated[
    int | None,
    typer.Option(
        min=0,
        help="Seconds between the signal to save and the time limit; by default "
        "reliability.stop_seconds + 60.",
    ),
]
Container = Annotated[
    str | None, typer.Option(help="Image for srun --container-image (pyxis); its `python` is used.")
]
Mounts = Annotated[
    str | None, typer.Option(help="srun --container-mounts; by default the working directory.")
]
Setup = Annotated[
    list[str] | None,
    typer.Option(
        help="File to source, or shell command to run, before the ranks start; repeatable."
    ),
]
MaxRequeues = Annotated[
    int, typer.Option(min=0, help="Stop after more consecutive failures without a new checkpoint.")
]
SbatchOptions = Annotated[
    list[str] | None,
    typer.Option("--sbatch", help='Any other sbatch option: --sbatch="--qos=high".'),
]
Python = Annotated[
    str | None, typer.Option(help="Python of the ranks; by default the one that runs this command.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the script; submit nothing.")]
Change = Annotated[
    bool,
    typer.Option(
        "--change", help="Allow changed schedule keys (see `phi4 recipe keys`) on resume."
    ),
]
RunDir = Annotated[Path, typer.Argument(help="Run directory (run.dir) of a submitted run.")]
