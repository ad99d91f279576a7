"""What a run does beside its steps: directory, checkpoints, faults and tracking."""

from typing import Literal

from phi4.config.fields import NonNegative, Positive, Section, key


class RunConfig(Section):
    """Where a run lives and how long it goes."""

    stage: str = key("identity", "pretrain", min_length=1)
    """What is trained: one of phi4.stages.STAGES."""
    dir: str = key("free", "runs/default", min_length=1)
    """Directory of the run: checkpoints, logs, metrics. A start resumes what is in it."""
    name: str | None = key("free", None)
    """Shown in MLflow; the directory's name when None."""
    steps: Positive = key("schedule", 100)
    """The run is finished after this optimizer step."""
    seed: int = key("identity", 1234, ge=0)
    """Seed of the initial weights and of the data order."""
    init_from: str | None = key("identity", None)
    """Checkpoint whose weights the run starts from; None draws them from the seed. The data of that
    run is left alone: see data.continue_from."""
    platform: Literal["auto", "cpu", "cuda"] = key("free", "auto")
    """cuda: NCCL. cpu: gloo. auto: cuda where a GPU is found."""
    threads: Positive = key("free", 1)
    """CPU threads of each process."""


class CheckpointConfig(Section):
    """What is saved, when and how."""

    every: NonNegative = key("free", 0)
    """Steps between saves; 0 saves only at the end."""
    keep: Positive = key("free", 3)
    """Complete checkpoints kept; older ones are removed after a save, except the newest that any
    layout can load (optimizer format full)."""
    optimizer_format: Literal["auto", "full", "dp"] = key("free", "auto")
    """full: any layout can load it, gathers 12 bytes per parameter in host memory. dp: no gather,
    same tensor and pipeline degrees. auto: full where the gather fits, else dp."""
    host_memory_share: float = key("free", 0.25, gt=0, le=1)
    """Share of a machine's memory that the gather of `full` may take before auto turns to dp."""
    reshardable_every: NonNegative = key("free", 0)
    """With auto and dp for routine saves: steps between full ones; 0 means only on request."""
    asynchronous: bool = key("free", False)
    """Write while training goes on; a checkpoint counts once it is durable. Takes as much of the
    host's memory as its ranks write. The last save of a run is waited for."""
    keep_every: NonNegative = key("free", 0)
    """Checkpoints of steps that this divides are never removed; 0 keeps none besides `keep`."""
    write_seconds: float = key("free", 1800.0, gt=0)
    """A save that is not durable after so long has failed."""
    replica_dir: str = key("free", "")
    """Directory on each host's own disk that takes a second copy of the newest checkpoint; a start
    takes from it what the run's directory has lost. Empty keeps none."""


class ReliabilityConfig(Section):
    """What a run does about notices, hangs, spikes and hardware that computes wrongly."""

    stop_seconds: float = key("free", 240.0, gt=0)
    """From a notice (SIGTERM, SIGUSR1) until the run must have saved and ended; then it is
    killed."""
    silence_seconds: float = key("free", 45.0, gt=0)
    """A rank that shows no sign of life for so long has stopped, and the run ends."""
    rendezvous_seconds: float = key("free", 600.0, gt=0)
    """How long ranks wait for each other at the start; every 30 s those missing are listed."""
    hang_seconds: float = key("free", 900.0, gt=0)
    """The run ends when its ranks live but none of them goes on for so long."""
    straggler_every: NonNegative = key("free", 100)
    """Steps between comparisons of the ranks' speed; 0 compares never."""
    straggler_factor: float = key("free", 1.5, gt=1)
    """A rank that takes so many times what its peers take is named."""
    spike_deviations: float = key("free", 12.0, ge=0)
    """A loss or gradient norm so many robust standard deviations above the median of the window
    before it is a spike; 0 looks for none."""
    spike_window: Positive = key("free", 128)
    """Steps that a spike is compared with; before half of them are done none is looked for."""
    max_bad_steps: Positive = key("free", 3)
    """Bad steps (spike or not finite) in a row whose update is skipped; the next one rolls back."""
    max_roll_backs: NonNegative = key("free", 3)
    """Roll backs of a run; then it ends as diverged."""
    replica_check_every: NonNegative = key("free", 1000)
    """Steps between comparisons of the parameters over ranks that hold the same; 0 compares
    never."""


class TrackingConfig(Section):
    """The view of a run in MLflow; files in run.dir are the record."""

    mlflow: bool = key("free", True)
    """Whether the run is shown in MLflow."""
    uri: str | None = key("free", None)
    """None takes MLFLOW_TRACKING_URI; without that, a local sqlite store beside run.dir."""
    experiment: str | None = key("free", None, min_length=1)
    """None takes MLFLOW_EXPERIMENT_NAME; without that, `phi4`."""
    peak_tflops: float | None = key("free", None, gt=0)
    """What MFU is a share of: the dense peak of one GPU in precision.dtype, in TFLOP/s. None takes
    the bf16 peak of the card where phi4 knows it, and reports no MFU elsewhere."""
    group_norms_every: NonNegative = key("free", 0)
    """Steps between records of the gradient norm of embedding, attention, mlp, norms and head,
    each by itself; one more pass over the gradient. 0 records none."""
    sweep: str | None = key("free", None, min_length=1)
    """Sweep that the run is one of, whose runs have one parent run; `phi4 sweep` sets it."""
