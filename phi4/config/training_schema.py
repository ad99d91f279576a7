"""How it is trained: batch, optimizer, preference loss and held-out evaluation."""

from typing import Literal

from phi4.config.fields import NonNegative, Positive, Section, key


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


class EvaluationConfig(Section):
    """Held-out loss during training."""

    every: NonNegative = key("free", 0)
    """Steps between evaluations; 0 evaluates only at the end."""
    batches: Positive = key("free", 8)
    """Global batches per evaluation."""
