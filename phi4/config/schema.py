"""The recipe's schema: every key, its unit, and what a change of it means for a running training.

Each key is declared `identity` (a change refuses to resume: it would be another model), `schedule`
(may change on resume with `--change`, recorded in the run's history with the step) or `free`
(layout, kernels, files: may change at any restart). Cross-checks between keys live in `rules.py`.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, Strict
from pydantic.fields import FieldInfo

Kind = Literal["identity", "schedule", "free"]
Implementation = Literal["auto", "torch", "triton", "gluon", "cuda", "te"]

Positive = Annotated[int, Field(ge=1)]
NonNegative = Annotated[int, Field(ge=0)]
# Strict alone would refuse the lists that TOML arrays become.
LayerCounts = Annotated[tuple[NonNegative, ...], Strict(False)]


def _key(kind: Kind, default: Any = ..., **constraints: Any) -> Any:
    return Field(default, json_schema_extra={"kind": kind}, **constraints)


class Section(BaseModel):
    """A frozen table of the recipe that refuses unknown keys and values of another type."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )


class ModelConfig(Section):
    """Shape of the model. Defaults are Phi-4's (14,659,507,200 parameters)."""

    num_layers: Positive = _key("identity", 40)
    hidden_size: Positive = _key("identity", 5120)
    num_attention_heads: Positive = _key("identity", 40)
    num_key_value_heads: Positive = _key("identity", 10)
    intermediate_size: Positive = _key("identity", 17920)
    """Width of the SwiGLU product; gate and up have this width each."""
    vocab_size: Positive = _key("identity", 100_352)
    max_position_embeddings: Positive = _key("identity", 16_384)
    """Longest sequence the exported model declares; training sequences may be shorter."""
    rope_theta: float = _key("identity", 10_000.0, gt=1)
    """RoPE base. Before midtraining the report does not state it; 250,000 after."""
    rms_norm_eps: float = _key("identity", 1e-5, gt=0)
    init_std: float = _key("identity", 0.02, gt=0)
    """Standard deviation of the initial matrices; output projections use init_std / sqrt(2 L)."""

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads


class TokenizerConfig(Section):
    """Which ids the tokens of the data mean."""

    kind: Literal["phi4", "bpe"] = _key("identity", "phi4")
    """phi4: cl100k_base plus 96 added tokens. bpe: a small vocabulary trained on the demo
    corpus."""
    path: str | None = _key("free", None)
    """Rank file. None lets phi4 use TIKTOKEN_CACHE_DIR or tiktoken's own download."""
    sha256: str | None = _key("identity", None, pattern=r"^[0-9a-f]{64}$")
    """Expected hash of a bpe rank file; phi4's own is built in."""


class SourceConfig(Section):
    """One named source of the blend."""

    name: str = _key("schedule", min_length=1)
    path: str = _key("free", min_length=1)
    """Prefix of a .bin/.idx pair, a glob of prefixes, or a .list file with a prefix per line. Files
    may move: what they must hold under this name is in the ledger, by their manifests' hash."""
    weight: float = _key("schedule", 1.0, ge=0)
    """Share of the blend drawn from this source: fractions that sum to 1, or ratios from 1 up."""
    max_epochs: float = _key("schedule", 0.0, ge=0)
    """The source may be read so many times, counted from the beginning of the ledger; 0 sets no
    limit."""
    kind: Literal["stream", "windows"] = _key("schedule", "stream")
    """stream: cut into units wherever documents end. windows: documents are kept whole up to
    sequence_length and packed best-fit into rows, for long documents and for chat records."""
    min_tokens: NonNegative = _key("schedule", 0)
    """Shorter documents are left out; windows only."""
    max_tokens: NonNegative = _key("schedule", 0)
    """Longer documents are left out; 0 sets no limit; windows only."""
    overlong: Literal["cut", "truncate", "drop"] | None = _key("schedule", None)
    """What becomes of documents longer than sequence_length. cut: they go on in other rows.
    truncate: the beginning is kept. drop: they are left out. None cuts text and refuses to cut
    conversations (documents with a loss mask): an answer without its question teaches the wrong
    thing. Streams only cut. The counts are shown at the start of a run."""


Sources = Annotated[tuple[SourceConfig, ...], Strict(False)]


class DataConfig(Section):
    """What is read, and how documents share a row."""

    sequence_length: Positive = _key("schedule", 4096)
    """Tokens in a row."""
    unit_tokens: Positive = _key("identity", 4096)
    """Labels in a unit, the smallest thing the blend counts; sequence_length is a multiple."""
    document_mask: bool = _key("schedule", True)
    """Attention and positions restart at each document."""
    sources: Sources = _key("schedule", ())
    weigh_by: Literal["units", "loss_tokens"] = _key("schedule", "units")
    """What the weights count. loss_tokens suits sources that differ in padding or mask."""
    continue_from: str | None = _key("identity", None)
    """Checkpoint or run directory whose ledger the run begins with, as midtraining does with
    pretraining's: sources of the same name go on where they stood, others begin. Needs the same
    run.seed and unit_tokens. Once the run has a checkpoint of its own, that one counts."""
    held_out: Sources = _key("free", ())
    """Never trained on; the evaluation hook measures their loss."""
    cache_dir: str | None = _key("free", None, min_length=1)
    """Where the manifests of sources of many shards and the tables of window rows are kept. None
    keeps them beside the shards; where that cannot be written, every rank makes them again."""
    max_open_shards: Positive = _key("free", 1024)
    """Shards that are mapped at once; each takes addresses, not memory."""


class BatchConfig(Section):
    """How many rows a step takes."""

    global_batch_size: Positive = _key("schedule", 8)
    """Rows per optimizer step over all data-parallel ranks."""
    micro_batch_size: Positive = _key("free", 1)
    """Rows per forward pass on one data-parallel rank."""


class OptimConfig(Section):
    """AdamW and its schedule: linear warm-up, then linear decay (report, section 3)."""

    learning_rate: float = _key("schedule", 3e-4, gt=0)
    """Peak."""
    min_learning_rate: float = _key("schedule", 0.0, ge=0)
    """At the end of the decay and after it."""
    schedule_unit: Literal["steps", "tokens"] = _key("schedule", "steps")
    warmup: NonNegative = _key("schedule", 0)
    """Length of the warm-up in schedule_unit."""
    decay: NonNegative = _key("schedule", 0)
    """Where the decay ends, from the start, in schedule_unit; 0 means the end of the run."""
    weight_decay: float = _key("schedule", 0.1, ge=0)
    """Decoupled; not applied to norm weights."""
    beta1: float = _key("identity", 0.9, ge=0, lt=1)
    beta2: float = _key("identity", 0.95, ge=0, lt=1)
    eps: float = _key("identity", 1e-8, gt=0)
    clip_grad: float = _key("schedule", 1.0, ge=0)
    """Largest global L2 norm of the gradient; 0 switches clipping off."""


class ParallelConfig(Section):
    """How many ranks share what. The product of the degrees is the number of processes."""

    tensor: Positive = _key("free", 1)
    pipeline: Positive = _key("free", 1)
    virtual_pipeline: Positive = _key("free", 1)
    """Model chunks per pipeline rank (interleaved 1F1B when above 1)."""
    context: Positive = _key("free", 1)
    context_attention: Literal["all_gather", "ring"] = _key("free", "all_gather")
    """How keys and values reach the other context ranks. all_gather: all at once, the least
    latency. ring: one rank's after the other while the last ones are attended, the least memory."""
    data: NonNegative = _key("free", 1)
    """Data-parallel replicas; 0 means whatever the started processes leave."""
    sequence: bool = _key("free", False)
    """Sequence parallelism: norms and residuals are split over the tensor ranks."""
    layers_per_stage: LayerCounts | None = _key("free", None)
    """Uneven pipeline: layers of each (virtual) stage in model order. The loss head weighs about
    1.5 layers at Phi-4's shape, so a shorter last stage balances."""
    overlap_p2p: bool = _key("free", False)
    """Overlap pipeline sends with compute. Needs virtual_pipeline > 1."""
    distributed_optimizer: bool = _key("free", False)
    """Split the optimizer state over the data-parallel ranks (ZeRO-1)."""
    overlap_grad_reduce: bool = _key("free", False)
    overlap_param_gather: bool = _key("free", False)

    @property
    def model_parallel_size(self) -> int:
        """Ranks that hold one copy of the model and share one batch slice."""
        return self.tensor * self.pipeline * self.context


class PrecisionConfig(Section):
    """Number formats."""

    dtype: Literal["fp32", "bf16"] = _key("schedule", "bf16")
    """Weights and activations of the forward pass. Master weights, gradients and optimizer state
    are always fp32."""


class RecomputeConfig(Section):
    """What the backward pass computes again instead of keeping."""

    granularity: Literal["none", "selective", "full"] = _key("free", "none")
    """selective: core attention. full: whole layers."""


class LossHeadConfig(Section):
    """What exists of a micro-batch's logits at a time."""

    form: Literal["logits", "recompute", "one_pass"] = _key("free", "logits")
    """logits: all of them, kept for backward. recompute: chunk_tokens' at a time, computed again in
    backward (a third more work of the head). one_pass: chunk_tokens' at a time, no work twice; for
    losses that are minus the masked log-probabilities, as in pretraining."""
    chunk_tokens: Positive = _key("free", 1024)
    """More tokens are faster on a GPU, and take 2 * vocab_size / tensor bytes each in bf16."""


class KernelsConfig(Section):
    """Implementation of each op; `auto` says aloud what it chose and why."""

    rope: Implementation = _key("free", "auto")
    rms_norm: Implementation = _key("free", "auto")
    swiglu: Implementation = _key("free", "auto")
    attention: Implementation = _key("free", "auto")
    cross_entropy: Implementation = _key("free", "auto")
    adamw: Implementation = _key("free", "auto")
    grad_norm: Implementation = _key("free", "auto")


class RunConfig(Section):
    """Where a run lives and how long it goes."""

    dir: str = _key("free", "runs/default", min_length=1)
    name: str | None = _key("free", None)
    """Shown in MLflow; the directory's name when None."""
    steps: Positive = _key("schedule", 100)
    """The run is finished after this optimizer step."""
    seed: int = _key("identity", 1234, ge=0)
    init_from: str | None = _key("identity", None)
    """Checkpoint whose weights the run starts from; None draws them from the seed. The data of that
    run is left alone: see data.continue_from."""
    platform: Literal["auto", "cpu", "cuda"] = _key("free", "auto")
    threads: Positive = _key("free", 1)
    """CPU threads of each process."""


class CheckpointConfig(Section):
    """What is saved, when and how."""

    every: NonNegative = _key("free", 0)
    """Steps between saves; 0 saves only at the end."""
    keep: Positive = _key("free", 3)
    """Complete checkpoints kept; older ones are removed after a save."""
    optimizer_format: Literal["auto", "full", "dp"] = _key("free", "auto")
    """full: any layout can load it, gathers 12 bytes per parameter in host memory. dp: no gather,
    same tensor and pipeline degrees. auto: full where the gather fits, else dp."""
    host_memory_share: float = _key("free", 0.25, gt=0, le=1)
    """Share of a machine's memory that the gather of `full` may take before auto turns to dp."""
    reshardable_every: NonNegative = _key("free", 0)
    """With auto and dp for routine saves: steps between full ones; 0 means only on request."""


class EvaluationConfig(Section):
    """Held-out loss during training."""

    every: NonNegative = _key("free", 0)
    """Steps between evaluations; 0 evaluates only at the end."""
    batches: Positive = _key("free", 8)
    """Global batches per evaluation."""


class TrackingConfig(Section):
    """The view of a run in MLflow; files in run.dir are the record."""

    mlflow: bool = _key("free", True)
    uri: str | None = _key("free", None)
    """None keeps a local sqlite store beside the run directories."""
    experiment: str = _key("free", "phi4", min_length=1)


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
    kernels: KernelsConfig = KernelsConfig()
    run: RunConfig = RunConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
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


def _kind_of(info: FieldInfo, key: str) -> Kind:
    extra = info.json_schema_extra
    assert isinstance(extra, dict) and extra.get("kind") in ("identity", "schedule", "free"), key
    return extra["kind"]
