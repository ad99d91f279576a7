"""Settings of a run other than its steps: directory, checkpoints, faults and tracking."""

from typing import Literal

from phi4.config.fields import NonNegative, Positive, Section, key


class RunConfig(Section):
    """Identity, directory and length of a run."""

    stage: str = key("identity", "pretrain", min_length=1)
    """Training stage: one of phi4.stages.STAGES."""
    dir: str = key("free", "runs/default", min_length=1)
    """Directory of the run: checkpoints, logs, metrics. A start resumes from it."""
    name: str | None = key("free", None)
    """Name of the run in MLflow; defaults to the directory's name."""
    steps: Positive = key("schedule", 100)
    """Number of optimizer steps after which the run is finished."""
    seed: int = key("identity", 1234, ge=0)
    """Seed of the initial weights and of the data order."""
    init_from: str | None = key("identity", None)
    """Checkpoint whose weights the run starts from; when unset, weights are initialised from the
    seed. The data position of that run is not used: see data.continue_from."""
    platform: Literal["auto", "cpu", "cuda"] = key("free", "auto")
    """cuda: NCCL. cpu: gloo. auto: cuda if a GPU is found."""
    threads: Positive = key("free", 1)
    """CPU threads of each process."""


class CheckpointConfig(Section):
    """When and how checkpoints are saved."""

    every: NonNegative = key("free", 0)
    """Steps between saves; 0 saves only at the end."""
    keep: Positive = key("free", 3)
    """Number of complete checkpoints to keep; older ones are removed after a save, except the
    newest that any layout can load (optimizer format full)."""
    optimizer_format: Literal["auto", "full", "dp"] = key("free", "auto")
    """full: any layout can load it; gathers 12 bytes per parameter in host memory. dp: no gather;
    needs the same tensor and pipeline degrees to load. auto: full where the gather fits in memory,
    else dp."""
    host_memory_share: float = key("free", 0.25, gt=0, le=1)
    """With auto: fraction of a machine's memory that the gather of `full` may use."""
    reshardable_every: NonNegative = key("free", 0)
    """With auto, and dp for routine saves: steps between full checkpoints; 0 means only on
    request."""
    asynchronous: bool = key("free", False)
    """Save asynchronously while training continues; a checkpoint counts once it is durable. Uses as
    much host memory as the ranks write. A run waits for its last save."""
    keep_every: NonNegative = key("free", 0)
    """Checkpoints whose step is a multiple of this are never removed; 0 keeps only those of
    `keep`."""
    write_seconds: float = key("free", 1800.0, gt=0)
    """Time after which a save that is not yet durable has failed."""
    replica_dir: str = key("free", "")
    """Directory on each host's local disk for a second copy of the newest checkpoint; a start
    restores from it what is missing in run.dir. Empty disables it."""


class ReliabilityConfig(Section):
    """Handling of notices, hangs, spikes and silent data corruption."""

    stop_seconds: float = key("free", 240.0, gt=0)
    """Time from a notice (SIGTERM, SIGUSR1) until the run must have saved and ended; after that it
    is killed."""
    silence_seconds: float = key("free", 45.0, gt=0)
    """Time without a heartbeat after which a rank counts as dead and the run ends."""
    rendezvous_seconds: float = key("free", 600.0, gt=0)
    """Time that ranks wait for each other at the start; missing ranks are listed every 30 s."""
    hang_seconds: float = key("free", 900.0, gt=0)
    """Time after which the run ends if its ranks are alive but none makes progress."""
    straggler_every: NonNegative = key("free", 100)
    """Steps between straggler checks; 0 disables them."""
    straggler_factor: float = key("free", 1.5, gt=1)
    """A rank that is slower than its peers by this factor is reported."""
    spike_deviations: float = key("free", 12.0, ge=0)
    """Threshold for a spike of loss or gradient norm, in robust standard deviations above the
    median of the window before it; 0 disables the check."""
    spike_window: Positive = key("free", 128)
    """Length of the window that a spike is compared with, in steps; no check before half of it is
    filled."""
    max_bad_steps: Positive = key("free", 3)
    """Consecutive bad steps (spike or not finite) whose update is skipped; the next one rolls
    back."""
    max_roll_backs: NonNegative = key("free", 3)
    """Maximum number of rollbacks; one more ends the run as diverged."""
    replica_check_every: NonNegative = key("free", 1000)
    """Steps between comparisons of replicated parameters across ranks; 0 disables them."""


class TrackingConfig(Section):
    """Tracking in MLflow; the files in run.dir remain the record of the run."""

    mlflow: bool = key("free", True)
    """Whether the run is logged to MLflow."""
    uri: str | None = key("free", None)
    """Tracking server or store. When unset: MLFLOW_TRACKING_URI, else a local sqlite store next to
    run.dir."""
    experiment: str | None = key("free", None, min_length=1)
    """Experiment. When unset: MLFLOW_EXPERIMENT_NAME, else `phi4`."""
    peak_tflops: float | None = key("free", None, gt=0)
    """Peak that MFU is relative to: dense TFLOP/s of one GPU in precision.dtype. When unset, the
    bf16 peak of the card if phi4 knows it; otherwise no MFU is reported."""
    group_norms_every: NonNegative = key("free", 0)
    """Steps between records of the gradient norm per parameter group (embedding, attention, mlp,
    norms, head); needs one more pass over the gradient; 0 disables them."""
    sweep: str | None = key("free", None, min_length=1)
    """Sweep that the run belongs to; its runs share one parent run; set by `phi4 sweep`."""
