"""What is trained: the model's shape and its number formats."""

from typing import Literal

from phi4.config.fields import NonNegative, Positive, Section, key


class ModelConfig(Section):
    """Architecture of the model. Defaults are Phi-4's (14,659,507,200 parameters)."""

    num_layers: Positive = key("identity", 40)
    """Transformer layers."""
    hidden_size: Positive = key("identity", 5120)
    """Hidden size; num_attention_heads must divide it."""
    num_attention_heads: Positive = key("identity", 40)
    """Query heads."""
    num_key_value_heads: Positive = key("identity", 10)
    """Key/value heads (GQA); each is shared by the same number of query heads."""
    intermediate_size: Positive = key("identity", 17920)
    """Inner size of the SwiGLU MLP; gate and up have this size each."""
    vocab_size: Positive = key("identity", 100_352)
    """Rows of the embedding and of the output matrix, which are not tied."""
    max_position_embeddings: Positive = key("identity", 16_384)
    """Longest sequence that the exported model declares; training sequences may be shorter."""
    rope_theta: float = key("identity", 10_000.0, gt=1)
    """RoPE base. The report does not state it before midtraining; 250,000 afterwards."""
    rms_norm_eps: float = key("identity", 1e-5, gt=0)
    """Epsilon of RMSNorm, added to the mean square."""
    init_std: float = key("identity", 0.02, gt=0)
    """Standard deviation of the initial matrices; output projections use init_std / sqrt(2 L)."""

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads


class PrecisionConfig(Section):
    """Number formats."""

    dtype: Literal["fp32", "bf16"] = key("identity", "bf16")
    """Format of weights and activations in the forward pass. Master weights, gradients and
    optimizer state are always fp32. To continue in another format, start a run with
    run.init_from."""
    fp8: Literal["off", "te", "torch"] = key("identity", "off")
    """FP8 for the layers' linears. torch: torch's own FP8 product, on GPUs of compute capability
    8.9 and up, and on a CPU. te: Transformer Engine, on a GPU. Embedding, attention, norms and loss
    head are unaffected. Evaluation, generation and exports do not use it."""
    fp8_recipe: Literal["tensorwise", "rowwise", "blockwise", "delayed"] = key(
        "identity", "tensorwise"
    )
    """Scaling granularity. tensorwise: one scale per matrix. rowwise: one per row that a product
    reads. blockwise: one per 1 x 128 values or 128 x 128 weights. delayed: one per matrix, from the
    largest values of earlier micro-batches; te only."""
    fp8_end_layers_in_bf16: NonNegative = key("identity", 1)
    """Number of layers at the beginning, and again at the end, that do not use FP8."""
    fp8_check_every: NonNegative = key("free", 100)
    """Steps between comparisons of a micro-batch with and without FP8; a layer that exceeds a limit
    stops using FP8 for the rest of the run; 0 disables them. fp8=torch only."""
    fp8_max_loss_gap: float = key("free", 0.05, gt=0)
    """Limit of |loss - loss without FP8| of the micro-batch, in nats per token, or per pair."""
    fp8_min_gradient_cosine: float = key("free", 0.8, gt=-1, lt=1)
    """Minimum cosine similarity of a layer's gradient to the gradient without FP8."""
    fp8_max_underflow: float = key("free", 0.5, gt=0, le=1)
    """Limit of the fraction of non-zero inputs or weights of a linear that underflow to zero in
    FP8. Gradients have no limit: those of confidently predicted tokens are small."""
    fp8_max_saturation: float = key("free", 0.001, gt=0, le=1)
    """Limit of the fraction of inputs, weights or gradients that exceed the largest FP8 number."""
