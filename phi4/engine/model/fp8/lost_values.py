"""Count the numbers that FP8 casts lose: underflows to zero, and values beyond the largest
number."""

from typing import Literal

import torch

from phi4.engine.model.fp8.casts import FP8Matrix

Cast = Literal["input", "weight", "gradient"]
CASTS: tuple[Cast, ...] = ("input", "weight", "gradient")
"""What a linear casts; gradient is that of its output."""

_MAGNITUDE_BITS = 0x7F


class LostValues:
    """Counts over the casts of one linear, without synchronising with the device.

    Args:
        device: device of the linear.

    Attributes:
        counts: [casts, 3] int64: non-zero numbers, those of them that became zero, and those beyond
            the largest FP8 number; in the order of CASTS.
    """

    def __init__(self, device: torch.device) -> None:
        self.counts = torch.zeros(len(CASTS), 3, dtype=torch.int64, device=device)

    def add(self, what: Cast, x_RK: torch.Tensor, matrix: FP8Matrix) -> None:
        """Count one cast.

        Args:
            what: which matrix was cast.
            x_RK: values before the cast.
            matrix: result of the cast.
        """
        is_value = x_RK != 0
        magnitude = matrix.data_RK.view(torch.uint8) & _MAGNITUDE_BITS
        largest = torch.tensor(torch.finfo(matrix.data_RK.dtype).max).to(matrix.data_RK.dtype)
        is_largest = magnitude == largest.view(torch.uint8).item()
        is_beyond = is_largest & (x_RK.abs().float() > matrix.values().abs())
        lost = (is_value, is_value & (magnitude == 0), is_beyond)
        self.counts[CASTS.index(what)] += torch.stack([one.sum() for one in lost])
