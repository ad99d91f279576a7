"""How far two log-probabilities of the same answer may lie apart."""

from typing import Literal

import numpy as np

SAME_FORWARD = 5e-5
"""Absolute, of two sums of the same per-token values in other orders."""
_RELATIVE = 1e-6
_BF16_TOKEN = 0.125
"""bf16 has 8 significant bits, so logits between 8 and 16 lie 1/16 apart, and what two layouts or
two row lengths round the other way moves a token's log-probability by up to one such step at each
of the last layers; 1/8 is two steps. Errors of tokens are independent: they grow with the root."""


def sum_tolerance(
    sums: np.ndarray, tokens: np.ndarray, dtype: Literal["fp32", "bf16"]
) -> np.ndarray:
    """Largest difference of log-probabilities of whole answers, [N].

    Args:
        sums: [N].
        tokens: loss tokens of each, [N].
        dtype: `precision.dtype`.
    """
    exact = np.maximum(SAME_FORWARD, _RELATIVE * np.abs(sums))
    if dtype == "fp32":
        return exact
    return np.maximum(exact, _BF16_TOKEN * np.sqrt(tokens))
