"""Number formats of a run: one dtype for weights and activations, fp32 for all that accumulates."""

import torch

from phi4.config import PrecisionConfig


def torch_dtype(precision: PrecisionConfig) -> torch.dtype:
    """Dtype of weights and activations."""
    return {"fp32": torch.float32, "bf16": torch.bfloat16}[precision.dtype]
