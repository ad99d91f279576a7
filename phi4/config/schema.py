"""The recipe's schema: every key, its unit, and what a change of it means for a running training.

Each key is declared `identity` (a change refuses to resume: it would be another model), `schedule`
(may change on resume with `--change`, recorded in the run's history with the step) or `free`
(layout, kernels, files: may change at any restart). Cross-checks between keys live in `rules.py`.
"""

from typing import Annotated, Literal

from pydantic import Strict
from pydantic.fields import FieldInfo

from phi4.config.data_schema import DataConfig, SourceConfig, TokenizerConfig
from phi4.config.fields import Kind, NonNegative, Positive, Section, key

Implementation = Literal["auto", "torch", "triton", "gluon", "cuda", "te", "flash", "cudnn"]
# Strict alone would refuse the lists that TOML arrays become.
LayerCounts = Annotated[tuple[NonNegative, ...], Strict(False)]


class ModelConfig(Section):
    """Shape of the model. Defaults are Phi-4's (14,659,507,200 parameters)."""

    num_layers: Positive = key("identity", 40)
    """Transformer layers."""
    hidden_size: Positive = key("identity", 5120)
    """Width of the residual stream; num_attention_heads divides it."""
    num_attention_heads: Positive = key("identity", 40)
    """Query heads."""
    num_key_value_heads: Positive = key("identity", 10)
    """Heads of keys and values, each shared by equally many query heads."""
    intermediate_size: Positive = key("identity", 17920)
    """Width of the SwiGLU product; gate and up have this width each."""
    vocab_size: Positive = key("identity", 100_352)
    """Rows of the embedding and of the output matrix, which are not tied."""
    max_position_embeddings: Positive = key("identity", 16_384)
    """Longest sequence the exported model declares; training sequences may be shorter."""
    rope_theta: float = key("identity", 10_000.0, gt=1)
    """RoPE base. Before midtraining the report does not state it; 250,000 after."""
    rms_norm_eps: float = key("identity", 1e-5, gt=0)
    """Added to the mean square in RMSNorm."""
    init_std: float = key("identity", 0.02, gt=0)
    """Standard deviation of the initial matrices; output projections use init_std / sqrt(2 L)."""

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads


class BatchConfig(Section):
    """How many rows a step takes."""

    global_batch_size: Positive = key("schedule", 8)
    """Rows per optimizer step over all data-parallel ranks."""
    micro_batch_size: Positive = key("free", 1)
    """Rows per forward pass on one data-parallel rank."""


class OptimConfig(Section):
    """AdamW and its schedule: linear warm-up, then linear decay (report, section 3)."""

    learning_rate: float = key("schedule", 3e-4, gt=0)
    """Peak."""
    min_learning_rate: float = key("schedule", 0.0, ge=0)
    """At the end of the decay and after it."""
    schedule_unit: Literal["steps", "tokens"] = key("schedule", "steps")
    """What warmup and decay count."""
    warmup: NonNegative = key("schedule", 0)
    """Length of the warm-up in schedule_unit."""
    decay: NonNegative = key("schedule", 0)
    """Where the decay ends, from the start, in schedule_unit; 0 means the end of the run."""
    weight_decay: float = key("schedule", 0.1, ge=0)
    """Decoupled; not applied to norm weights."""
    beta1: float = key("identity", 0.9, ge=0, lt=1)
    """Decay of AdamW's first moment."""
    beta2: float = key("identity", 0.95, ge=0, lt=1)
    """Decay of AdamW's second moment."""
    eps: float = key("identity", 1e-8, gt=0)
    """Added to the root of AdamW's bias-corrected second moment."""
    clip_grad: float = key("schedule", 1.0, ge=0)
    """Largest global L2 norm of the gradient; 0 switches clipping off."""


class ParallelConfig(Section):
    """How many ranks share what. The product of the degrees is the number of processes."""

    tensor: Positive = key("free", 1)
    """Ranks that share every matrix. Divides num_attention_heads, num_key_value_heads,
    intermediate_size and vocab_size."""
    pipeline: Positive = key("free", 1)
    """Ranks that share the layers; each holds consecutive ones."""
    virtual_pipeline: Positive = key("free", 1)
    """Model chunks per pipeline rank (interleaved 1F1B when above 1)."""
    context: Positive = key("free", 1)
    """Ranks that share the tokens of a row."""
    context_attention: Literal["all_gather", "ring"] = key("free", "all_gather")
    """How keys and values reach the other context ranks. all_gather: all at once, the least
    latency. ring: one rank's after the other while the last ones are attended, the least memory."""
    data: NonNegative = key("free", 1)
    """Data-parallel replicas; 0 means whatever the started processes leave."""
    sequence: bool = key("free", False)
    """Sequence parallelism: norms and residuals are split over the tensor ranks."""
    layers_per_stage: LayerCounts | None = key("free", None)
    """Uneven pipeline: layers of each (virtual) stage in model order. The loss head weighs about
    1.5 layers at Phi-4's shape, so a shorter last stage balances."""
    overlap_p2p: bool = key("free", False)
    """Overlap pipeline sends with compute. Needs virtual_pipeline > 1."""
    distributed_optimizer: bool = key("free", False)
    """Split the optimizer state over the data-parallel ranks (ZeRO-1)."""
    overlap_grad_reduce: bool = key("free", False)
    """Reduce gradients over the data-parallel ranks while backward is still computing others."""
    overlap_param_gather: bool = key("free", False)
    """Gather updated parameters while forward is computing. Needs distributed_optimizer and
    overlap_grad_reduce."""

    @property
    def model_parallel_size(self) -> int:
        """Ranks that hold one copy of the model and share one batch slice."""
        return self.tensor * self.pipeline * self.context

    @property
    def needs_one_queue(self) -> bool:
        """Whether a GPU must start kernels in the order they were queued in: the communication of
        tensor and context parallelism before the products that hide it."""
        return self.tensor > 1 or self.context > 1


class PrecisionConfig(Section):
    """Number formats."""

    dtype: Literal["fp32", "bf16"] = key("identity", "bf16")
    """Weights and activations of the forward pass. Master weights, gradients and optimizer state
    are always fp32. To go on in another format, start a run with run.init_from."""
    fp8: Literal["off", "te", "torch"] = key("identity", "off")
    """torch: the linears of the layers multiply in FP8 by torch's own product, on GPUs of compute
    capability 8.9 and up, and on a CPU. te: by Transformer Engine, on a GPU. Embedding, attention,
    norms and loss head stay as they are. Evaluation, generation and exports do not use it."""
    fp8_recipe: Literal["tensorwise", "rowwise", "blockwise", "delayed"] = key(
        "identity", "tensorwise"
    )
    """What shares a scale: a matrix, a row of what a product reads, or 1 x 128 values and 128 x 128
    weights. delayed: a matrix, by the largest values of the micro-batches before; te alone."""
    fp8_end_layers_in_bf16: NonNegative = key("identity", 1)
    """So many layers at the beginning, and as many at the end, do not use FP8."""
    fp8_check_every: NonNegative = key("free", 100)
    """Steps between comparisons of a micro-batch with FP8 and without it, after which a layer
    beyond a limit leaves FP8 for good; 0 compares never. Only fp8=torch is compared."""
    fp8_max_loss_gap: float = key("free", 0.05, gt=0)
    """Largest |loss - loss without FP8| of the micro-batch, in nats per token, or per pair."""
    fp8_min_gradient_cosine: float = key("free", 0.8, gt=-1, lt=1)
    """Least cosine of a layer's gradient to the one without FP8."""
    fp8_max_underflow: float = key("free", 0.5, gt=0, le=1)
    """Largest share of the non-zero inputs or weights of a linear that FP8 makes zero. Gradients
    have no limit: those of tokens that the model is sure of are small."""
    fp8_max_saturation: float = key("free", 0.001, gt=0, le=1)
    """Largest share of inputs, weights or gradients beyond the largest FP8 number."""


class RecomputeConfig(Section):
    """What the backward pass computes again instead of keeping."""

    granularity: Literal["none", "selective", "full"] = key("free", "none")
    """selective: core attention. full: whole layers."""


class LossHeadConfig(Section):
    """What exists of a micro-batch's logits at a time."""

    form: Literal["logits", "recompute", "one_pass"] = key("free", "logits")
    """logits: all of them, kept for backward. recompute: chunk_tokens' at a time, computed again in
    backward (a third more work of the head). one_pass: chunk_tokens' at a time, no work twice; for
    losses that are minus the masked log-probabilities, as in pretraining."""
    chunk_tokens: Positive = key("free", 1024)
    """More tokens are faster on a GPU, and take 2 * vocab_size / tensor bytes each in bf16."""


class DpoConfig(Section):
    """The loss of run.stage=dpo; the report leaves all of it open."""

    loss: Literal["sigmoid", "sigmoid_norm", "ipo", "hinge"] = key("schedule", "sigmoid")
    """sigmoid: Rafailov et al. 2023, equation 7. sigmoid_norm: each answer's log-ratio is divided
    by its number of tokens. ipo: Azar et al. 2023, equation 17, divided likewise. hinge: Zhao et
    al. 2023."""
    beta: float = key("schedule", 0.1, gt=0)
    """How strongly the policy is held to the reference."""
    label_smoothing: float = key("schedule", 0.0, ge=0, lt=0.5)
    """Share of pairs that are taken to be labelled the wrong way round; sigmoid only."""
    sft_weight: float = key("schedule", 0.0, ge=0)
    """Weight of the mean negative log-probability of the chosen answers' tokens."""
    reference: str | None = key("identity", None, min_length=1)
    """Checkpoint or run that the log-probabilities of data.reference_cache are of; None is
    run.init_from."""
    gate: bool = key("free", True)
    """Whether a run checks reference, packing and layout on a batch before its first step."""


class KernelsConfig(Section):
    """Implementation of each op; `auto` logs its choice and the reason. `flash` (FlashAttention, or
    PyTorch's copy of it) and `cudnn` are other people's attention: bf16, no context parallelism."""

    rope: Implementation = key("free", "auto")
    """Rotary position embedding of queries and keys."""
    rms_norm: Implementation = key("free", "auto")
    """RMSNorm."""
    swiglu: Implementation = key("free", "auto")
    """silu(gate) * up, between the two products of the MLP."""
    attention: Implementation = key("free", "auto")
    """Causal attention within documents."""
    cross_entropy: Implementation = key("free", "auto")
    """Log-probabilities of the labels from this rank's logits."""
    adamw: Implementation = key("free", "auto")
    """The optimizer update."""
    grad_norm: Implementation = key("free", "auto")
    """Sum of squares of the gradient, for clipping."""
    fp8_cast: Implementation = key("free", "auto")
    """The casts of precision.fp8=torch with a scale per matrix."""
    deterministic: bool = key("free", True)
    """Two runs of a step give equal bits, by which a replay tells a machine's fault from the
    data's: an implementation without them, as cudnn, is refused. `auto` takes none either way."""
    qualify: Literal["on", "off", "required"] = key("free", "on")
    """On a GPU without proofs of its own for these sources and this Triton: prove the kernels and
    time them beside torch before the first step, at most a minute, one rank per machine. `required`
    ends a run where an op would be torch's all the same; `off` takes the proofs there are."""

    def by_op(self) -> dict[str, Implementation]:
        """What is asked of every op."""
        return self.model_dump(exclude={"deterministic", "qualify"})


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


class EvaluationConfig(Section):
    """Held-out loss during training."""

    every: NonNegative = key("free", 0)
    """Steps between evaluations; 0 evaluates only at the end."""
    batches: Positive = key("free", 8)
    """Global batches per evaluation."""


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


class Recipe(Section):
    """Everything that defines a training run."""

    model: ModelConfig = ModelConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()
    data: DataConfig = DataConfig()
    batch: BatchConfig = BatchConfig()
    optim: OptimConfig = OptimConfig()
    parallel: ParallelConfig = ParallelConfig()
    precision: PrecisionConfig = PrecisionConfig()
    recompute: RecomputeConfig = RecomputeConfig()
    loss_head: LossHeadConfig = LossHeadConfig()
    dpo: DpoConfig = DpoConfig()
    kernels: KernelsConfig = KernelsConfig()
    run: RunConfig = RunConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    reliability: ReliabilityConfig = ReliabilityConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    tracking: TrackingConfig = TrackingConfig()


def key_kinds() -> dict[str, Kind]:
    """Kind of every dotted key of the recipe, for example `model.num_layers: identity`."""
    kinds: dict[str, Kind] = {}
    for section, field in Recipe.model_fields.items():
        for name, info in field.annotation.model_fields.items():
            kinds[f"{section}.{name}"] = _kind_of(info, f"{section}.{name}")
    return kinds


def source_key_kinds() -> dict[str, Kind]:
    """Kind of every key of a source; where only free ones change, so do the sources."""
    fields = SourceConfig.model_fields
    return {name: _kind_of(info, f"source.{name}") for name, info in fields.items()}


def _kind_of(info: FieldInfo, name: str) -> Kind:
    extra = info.json_schema_extra
    assert isinstance(extra, dict) and extra.get("kind") in ("identity", "schedule", "free"), name
    return extra["kind"]
