"""Number formats of a run: weights and activations in one dtype; masters, gradients and moments fp32."""

import torch

from phi4.config import PrecisionConfig


def torch_dtype(precision: PrecisionConfig) -> torch.dtype:
    """Dtype of weights and activations."""
    return {"fp32": torch.float32, "bf16": torch.bfloat16}[precision.dtype]
