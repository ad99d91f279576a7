"""How a step is executed: layout, recomputation, loss head and kernels."""

from typing import Annotated, Literal

from pydantic import Strict

from phi4.config.fields import NonNegative, Positive, Section, key

Implementation = Literal["auto", "torch", "triton", "gluon", "cuda", "te", "flash", "cudnn"]
# Strict alone would refuse the lists that TOML arrays become.
LayerCounts = Annotated[tuple[NonNegative, ...], Strict(False)]


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
