"""Generate the sbatch script of a run: short enough for the person on call to read.

The script itself decides how the job ends. `--requeue` alone requeues a job only if Slurm ended it;
a job whose ranks saved and left after a notice would be COMPLETED.
"""

import re
import shlex
import textwrap
from collections.abc import Mapping

from phi4 import __version__
from phi4.launch.slurm import script_parts
from phi4.launch.slurm.request import SlurmRequest
from phi4.rundir.names import CHECKPOINTS_DIR, LATEST_FILE, RECIPE_FILE, SLURM_DIR, STOP_FILE


def script_text(request: SlurmRequest) -> str:
    """Return the script for sbatch."""
    is_torchrun = request.starter == "torchrun"
    node_part = (script_parts.TORCHRUN,) if is_torchrun else ()
    parts = (*script_parts.BEGINNING, *node_part, script_parts.MAIN)
    text = "\n".join(part.strip("\n") + "\n" for part in parts)
    values = {
        "written_by": request.written_by,
        "version": __version__,
        "options": "\n".join(f"#SBATCH {option}" for option in _sbatch_options(request)),
        "run": _run_part(request),
        "output": '\nexec >>"$files/$job.out" 2>&1' if request.tasks else "",
        "submit": "phi4 sweep run --slurm" if request.tasks else "phi4 launch slurm",
        "max_retries": request.max_retries,
        "tasks_per_node": request.tasks_per_node,
        "slurm_dir": SLURM_DIR,
        "stop_file": STOP_FILE,
        "latest": f"{CHECKPOINTS_DIR}/{LATEST_FILE}",
        "setup": request.setup.strip("\n") or "# (nothing: --setup names a file or a command)",
        "settings": _settings(request),
        "srun_options": " \\\n    ".join(_srun_options(request)),
        "node": 'bash -c "$node_program" node "$here" ' if is_torchrun else "",
        "command": _command(request),
    }
    return _filled(text, values)


def _filled(text: str, values: Mapping[str, object]) -> str:
    # `@{name}` as the placeholder, because bash uses dollar signs.
    return re.sub(r"@\{(\w+)\}", lambda match: str(values[match[1]]), text)


def _run_part(request: SlurmRequest) -> str:
    """Return the bash that selects the run of a job, or of a task of an array."""
    values = {
        "run_dir": shlex.quote(request.run_dir),
        "last_step": request.last_step,
        "tasks": "\n".join(
            f"    {shlex.quote(f'{task.last_step} {task.run_dir}')}" for task in request.tasks
        ),
    }
    part = script_parts.RUN_OF_ARRAY if request.tasks else script_parts.ONE_RUN
    return _filled(part.strip("\n"), values)


def _command(request: SlurmRequest) -> str:
    words = shlex.join(request.command)
    return f'{words} "$run/{SLURM_DIR}/{RECIPE_FILE}"' if request.tasks else words


def _sbatch_options(request: SlurmRequest) -> list[str]:
    options = [f"--job-name={request.name}", f"--nodes={request.nodes}", _room_option(request)]
    if request.gpus_per_node:
        options.append(f"--gpus-per-node={request.gpus_per_node}")
    for option, value in (
        ("cpus-per-task", request.cpus_per_task),
        ("partition", request.partition),
        ("account", request.account),
        ("time", request.time_limit),
    ):
        if value is not None:
            options.append(f"--{option}={value}")
    if request.tasks:
        limit = f"%{request.parallel_tasks}" if request.parallel_tasks else ""
        options.append(f"--array=0-{len(request.tasks) - 1}{limit}")
    output = "%A_%a" if request.tasks else "%j"
    options += [
        "--requeue",
        "--open-mode=append",
        f"--output={request.run_dir}/{SLURM_DIR}/{output}.out",
    ]
    if request.signal_seconds:
        options.append(f"--signal=B:USR1@{request.signal_seconds}")
    return [*options, *request.sbatch]


def _room_option(request: SlurmRequest) -> str:
    tasks = _slurm_tasks_per_node(request)
    if request.nodes.least == request.nodes.most:
        return f"--ntasks-per-node={tasks}"
    # sbatch would interpret a range as least * tasks tasks, and Slurm gives a job no more nodes
    # than tasks.
    return f"--mincpus={tasks * (request.cpus_per_task or 1)}"


def _slurm_tasks_per_node(request: SlurmRequest) -> int:
    return 1 if request.starter == "torchrun" else request.tasks_per_node


def _srun_options(request: SlurmRequest) -> list[str]:
    tasks = _slurm_tasks_per_node(request)
    options = [
        # A requeued job may have another number of nodes than the submitted one.
        f'--nodes="$SLURM_JOB_NUM_NODES" --ntasks=$((SLURM_JOB_NUM_NODES * {tasks}))',
        f"--ntasks-per-node={tasks} --kill-on-bad-exit=1",
    ]
    if request.cpus_per_task:
        # Since Slurm 22.05 srun does not inherit it from sbatch.
        options.append(f"--cpus-per-task={request.cpus_per_task}")
    if request.container:
        mounts = (
            shlex.quote(request.container_mounts) if request.container_mounts else '"$PWD:$PWD"'
        )
        options.append(f"--container-image={shlex.quote(request.container)}")
        options.append(f'--container-workdir="$PWD" --container-mounts={mounts}')
    return options


def _settings(request: SlurmRequest) -> str:
    lines = []
    for setting in request.settings:
        lines += textwrap.wrap(setting.reason, 96, initial_indent="# ", subsequent_indent="# ")
        lines.append(f"export {setting.name}=${{{setting.name}-{setting.value}}}")
    return "\n".join(lines)
