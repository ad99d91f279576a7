"""The job that the Slurm options of `phi4 launch slurm` and `phi4 sweep run` ask for."""

import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from phi4.errors import ConfigError
from phi4.launch import slurm


def asked_request(
    given: Mapping[str, Any],
    *,
    run_dir: str,
    last_step: int,
    name: str,
    arguments: Sequence[str],
    stop_seconds: float,
) -> slurm.SlurmRequest:
    """The request of a command's options.

    Args:
        given: options by parameter name, those of `phi4.cli.launch_options`.
        run_dir: as in `SlurmRequest`.
        last_step: likewise.
        name: of the job.
        arguments: of `phi4` on every rank.
        stop_seconds: time that a run may take to save and stop.
    """
    python = given["python"] or ("python" if given["container"] else sys.executable)
    signal_seconds = given["signal_seconds"]
    return slurm.SlurmRequest(
        written_by=shlex.join(["phi4", *sys.argv[1:]]).replace(" --dry-run", ""),
        run_dir=run_dir,
        last_step=last_step,
        command=(python, "-m", "phi4", *arguments),
        nodes=slurm.NodeRange.parse(given["nodes"]),
        tasks_per_node=given["tasks_per_node"] or given["gpus_per_node"] or 1,
        gpus_per_node=given["gpus_per_node"],
        starter="torchrun" if given["torchrun"] else "srun",
        name=name,
        partition=given["partition"],
        account=given["account"],
        time_limit=given["time"],
        signal_seconds=round(stop_seconds) + 60 if signal_seconds is None else signal_seconds,
        max_retries=given["max_requeues"],
        setup=_setup_lines(given["setup"]),
        container=given["container"],
        container_mounts=given["container_mounts"],
        cpus_per_task=given["cpus_per_task"],
        sbatch=tuple(given["sbatch"] or ()),
    )


def require_notice_in_time(request: slurm.SlurmRequest) -> None:
    """Refuse a time limit that is all notice.

    Raises:
        ConfigError: the notice comes before the attempt begins.
    """
    limit = request.time_limit
    if limit and slurm.limit_seconds(limit) <= request.signal_seconds:
        raise ConfigError(
            f"--time={limit} leaves nothing before the notice of --signal-seconds="
            f"{request.signal_seconds}; give the run longer, or a shorter notice"
        )


def _setup_lines(setup: list[str] | None) -> str:
    """The --setup options as shell lines; a file is sourced."""
    return "\n".join(
        f"source {shlex.quote(text)}" if Path(text).is_file() else text for text in setup or []
    )
