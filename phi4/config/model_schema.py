"""What is trained: the model's shape and its number formats."""

from typing import Literal

from phi4.config.fields import NonNegative, Positive, Section, key


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
