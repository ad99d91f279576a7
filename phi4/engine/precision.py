"""Number formats of a run: one dtype for weights and activations, fp32 for accumulation.

In layers that use FP8, the factors of the linears' products are cast to it; nothing is kept in FP8
beyond a step.
"""

import torch

from phi4.config import PrecisionConfig, Recipe
from phi4.config.fp8_rules import fp8_layers


def torch_dtype(precision: PrecisionConfig) -> torch.dtype:
    """Return the dtype of weights and activations."""
    return {"fp32": torch.float32, "bf16": torch.bfloat16}[precision.dtype]


def describe_precision(recipe: Recipe) -> str:
    """Describe the formats in words, for a console line; layers count from 1."""
    precision, layers = recipe.precision, fp8_layers(recipe)
    if not layers:
        return precision.dtype
    compares = precision.fp8 == "torch" and precision.fp8_check_every > 0
    check = f"every {precision.fp8_check_every} steps" if compares else "never"
    return (
        f"{precision.dtype}, layers {layers[0] + 1} to {layers[-1] + 1} of "
        f"{recipe.model.num_layers} in FP8 ({precision.fp8}, {precision.fp8_recipe}), "
        f"compared with {precision.dtype} {check}"
    )
