"""Runs on a Slurm cluster: the sbatch script, its submission, and the state of jobs."""

from phi4.launch.slurm.fitting import require_fit
from phi4.launch.slurm.jobs import (
    JobAttempt,
    RunStatus,
    attempts,
    cancel,
    log_paths,
    newest,
    status,
)
from phi4.launch.slurm.request import (
    ArrayTask,
    NodeRange,
    RankStarter,
    Setting,
    SlurmRequest,
    limit_seconds,
)
from phi4.launch.slurm.script import script_text
from phi4.launch.slurm.settings import rank_settings
from phi4.launch.slurm.submission import (
    require_idle,
    require_idle_array,
    require_partition,
    require_same_run,
    require_version,
    submit,
    submit_array,
    submitted_recipe_path,
)

__all__ = [
    "ArrayTask",
    "JobAttempt",
    "NodeRange",
    "RankStarter",
    "RunStatus",
    "Setting",
    "SlurmRequest",
    "attempts",
    "cancel",
    "limit_seconds",
    "log_paths",
    "newest",
    "rank_settings",
    "require_fit",
    "require_idle",
    "require_idle_array",
    "require_partition",
    "require_same_run",
    "require_version",
    "script_text",
    "status",
    "submit",
    "submit_array",
    "submitted_recipe_path",
]
