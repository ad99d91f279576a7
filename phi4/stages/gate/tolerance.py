"""Tolerance between two log-probabilities of the same answer."""

from typing import Literal

import numpy as np

SAME_FORWARD = 5e-5
"""Absolute tolerance of two sums of the same per-token values in different orders."""
_RELATIVE = 1e-6
_BF16_TOKEN = 0.125
"""bf16 has 8 significant bits, so logits between 8 and 16 are spaced 1/16 apart. Different rounding
in two layouts or two row lengths moves a token's log-probability by up to one such step at each of
the last layers; 1/8 is two steps. Errors of tokens are independent, so they grow with the square
root."""


def sum_tolerance(
    sums: np.ndarray, tokens: np.ndarray, dtype: Literal["fp32", "bf16"]
) -> np.ndarray:
    """Return the largest allowed difference of the answers' summed log-probabilities, [N].

    Args:
        sums: [N].
        tokens: loss tokens of each, [N].
        dtype: `precision.dtype`.
    """
    exact = np.maximum(SAME_FORWARD, _RELATIVE * np.abs(sums))
    if dtype == "fp32":
        return exact
    return np.maximum(exact, _BF16_TOKEN * np.sqrt(tokens))
