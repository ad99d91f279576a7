"""How a step is executed: layout, recomputation, loss head and kernels."""

from typing import Annotated, Literal

from pydantic import Strict

from phi4.config.fields import NonNegative, Positive, Section, key

Implementation = Literal["auto", "torch", "triton", "gluon", "cuda", "te", "flash", "cudnn"]
# Strict mode alone would reject the lists that TOML arrays are parsed into.
LayerCounts = Annotated[tuple[NonNegative, ...], Strict(False)]


class ParallelConfig(Section):
    """Parallel layout. The product of the degrees is the number of processes."""

    tensor: Positive = key("free", 1)
    """Tensor-parallel ranks; every matrix is split over them. Must divide num_attention_heads,
    num_key_value_heads, intermediate_size and vocab_size."""
    pipeline: Positive = key("free", 1)
    """Pipeline-parallel ranks; each holds consecutive layers."""
    virtual_pipeline: Positive = key("free", 1)
    """Model chunks per pipeline rank (interleaved 1F1B when above 1)."""
    context: Positive = key("free", 1)
    """Context-parallel ranks; the tokens of a row are split over them."""
    context_attention: Literal["all_gather", "ring"] = key("free", "all_gather")
    """How keys and values reach the other context ranks. all_gather: all at once, lowest latency.
    ring: one rank's at a time, overlapped with attention over the previous one's, lowest memory."""
    data: NonNegative = key("free", 1)
    """Data-parallel replicas; 0 means all remaining processes."""
    sequence: bool = key("free", False)
    """Sequence parallelism: norms and residuals are split over the tensor ranks."""
    layers_per_stage: LayerCounts | None = key("free", None)
    """Uneven pipeline: layers of each (virtual) stage in model order. The loss head costs about 1.5
    layers at Phi-4's shape, so a shorter last stage balances the load."""
    overlap_p2p: bool = key("free", False)
    """Overlap pipeline sends with compute. Needs virtual_pipeline > 1."""
    distributed_optimizer: bool = key("free", False)
    """Split the optimizer state over the data-parallel ranks (ZeRO-1)."""
    overlap_grad_reduce: bool = key("free", False)
    """Overlap the gradient reduction over data-parallel ranks with the rest of the backward
    pass."""
    overlap_param_gather: bool = key("free", False)
    """Overlap the gathering of updated parameters with the forward pass. Needs
    distributed_optimizer and overlap_grad_reduce."""
    fp8_param_gather: bool = key("free", False)
    """Gather the updated weights of FP8 linears in FP8, one byte per number instead of two. Needs
    distributed_optimizer and precision.fp8=torch with fp8_recipe=tensorwise and dtype=bf16; changes
    no result."""

    @property
    def model_parallel_size(self) -> int:
        """Ranks that hold one copy of the model and share one slice of the batch."""
        return self.tensor * self.pipeline * self.context

    @property
    def needs_one_queue(self) -> bool:
        """Whether a GPU must run kernels in the order in which they were queued: the communication
        of tensor and context parallelism before the products that it overlaps with."""
        return self.tensor > 1 or self.context > 1


class RecomputeConfig(Section):
    """Activation recomputation in the backward pass."""

    granularity: Literal["none", "selective", "full"] = key("free", "none")
    """selective: core attention only. full: entire layers."""


class LossHeadConfig(Section):
    """Memory use of the loss head."""

    form: Literal["logits", "recompute", "one_pass"] = key("free", "logits")
    """logits: the logits of the micro-batch are kept for backward. recompute: chunks of
    chunk_tokens are computed again in backward (a third more work in the head). one_pass: chunks of
    chunk_tokens, nothing is recomputed; for losses that are minus the masked log-probabilities, as
    in pretraining."""
    chunk_tokens: Positive = key("free", 1024)
    """Tokens per chunk. Larger chunks are faster on a GPU and take 2 * vocab_size / tensor bytes
    per token in bf16."""


class KernelsConfig(Section):
    """Implementation of each op; `auto` logs its choice and the reason. `flash` (FlashAttention, or
    PyTorch's build of it) and `cudnn` are third-party attention: bf16 only, no context
    parallelism."""

    rope: Implementation = key("free", "auto")
    """Rotary position embedding of queries and keys."""
    rms_norm: Implementation = key("free", "auto")
    """RMSNorm."""
    swiglu: Implementation = key("free", "auto")
    """silu(gate) * up of the MLP."""
    attention: Implementation = key("free", "auto")
    """Causal attention within documents."""
    cross_entropy: Implementation = key("free", "auto")
    """Log-probabilities of the labels from this rank's logits."""
    adamw: Implementation = key("free", "auto")
    """The optimizer update."""
    grad_norm: Implementation = key("free", "auto")
    """Sum of squares of the gradient, for clipping."""
    fp8_cast: Implementation = key("free", "auto")
    """Casts of precision.fp8=torch with one scale per matrix."""
    deterministic: bool = key("free", True)
    """Require bit-identical results when a step is repeated, which lets a replay tell hardware
    faults from data faults; implementations without this property, such as cudnn, are refused.
    `auto` never chooses one of those."""
    qualify: Literal["on", "off", "required"] = key("free", "on")
    """On a GPU without proof rows for these sources and this Triton version: test the kernels and
    time them against torch before the first step, for at most a minute, on one rank per machine.
    `required` ends the run if an op would still fall back to torch; `off` uses existing proof rows
    only."""

    def by_op(self) -> dict[str, Implementation]:
        """Return the implementation requested for every op."""
        return self.model_dump(exclude={"deterministic", "qualify"})
