"""How it is trained: batch, optimizer, preference loss and held-out evaluation."""

from typing import Literal

from phi4.config.fields import NonNegative, Positive, Section, key


class BatchConfig(Section):
    """Batch sizes."""

    global_batch_size: Positive = key("schedule", 8)
    """Rows per optimizer step over all data-parallel ranks."""
    micro_batch_size: Positive = key("free", 1)
    """Rows per forward pass on one data-parallel rank."""


class OptimConfig(Section):
    """AdamW and its schedule: linear warm-up, then linear decay (report, section 3)."""

    learning_rate: float = key("schedule", 3e-4, gt=0)
    """Peak."""
    min_learning_rate: float = key("schedule", 0.0, ge=0)
    """Learning rate at and after the end of the decay."""
    schedule_unit: Literal["steps", "tokens"] = key("schedule", "steps")
    """Unit of warmup and decay."""
    warmup: NonNegative = key("schedule", 0)
    """Length of the warm-up in schedule_unit."""
    decay: NonNegative = key("schedule", 0)
    """End of the decay, counted from the start, in schedule_unit; 0 means the end of the run."""
    weight_decay: float = key("schedule", 0.1, ge=0)
    """Decoupled weight decay; not applied to norm weights."""
    beta1: float = key("identity", 0.9, ge=0, lt=1)
    """AdamW beta1."""
    beta2: float = key("identity", 0.95, ge=0, lt=1)
    """AdamW beta2."""
    eps: float = key("identity", 1e-8, gt=0)
    """AdamW epsilon, added to the root of the bias-corrected second moment."""
    clip_grad: float = key("schedule", 1.0, ge=0)
    """Maximum global L2 norm of the gradient; 0 disables clipping."""


class DpoConfig(Section):
    """The loss of run.stage=dpo; the report specifies none of these values."""

    loss: Literal["sigmoid", "sigmoid_norm", "ipo", "hinge"] = key("schedule", "sigmoid")
    """sigmoid: Rafailov et al. 2023, equation 7. sigmoid_norm: each answer's log-ratio is divided
    by its number of tokens. ipo: Azar et al. 2023, equation 17, also divided by the number of
    tokens. hinge: Zhao et al. 2023."""
    beta: float = key("schedule", 0.1, gt=0)
    """Strength of the constraint to the reference model."""
    label_smoothing: float = key("schedule", 0.0, ge=0, lt=0.5)
    """Label smoothing: assumed probability that a pair is labelled the wrong way round; sigmoid
    only."""
    sft_weight: float = key("schedule", 0.0, ge=0)
    """Weight of the mean negative log-probability of the chosen answers' tokens."""
    reference: str | None = key("identity", None, min_length=1)
    """Checkpoint or run directory of the reference model whose log-probabilities are in
    data.reference_cache; defaults to run.init_from."""
    gate: bool = key("free", True)
    """Check reference, packing and layout on a batch before the first step."""


class EvaluationConfig(Section):
    """Held-out loss during training."""

    every: NonNegative = key("free", 0)
    """Steps between evaluations; 0 evaluates only at the end."""
    batches: Positive = key("free", 8)
    """Global batches per evaluation."""
