"""Which numbers of a linear layer share a scale, and in which format its three products read them.

The products are y = x w^T, dx = dy w and dw = dy^T x, and each factor is cast along the dimension
that its product sums over.
"""

from dataclasses import dataclass
from typing import Literal

import torch

from phi4.config.fp8_rules import FP8_BLOCK
from phi4.engine.model.fp8.scales import E4M3, E5M2

BLOCK = FP8_BLOCK


@dataclass(frozen=True)
class Scaling:
    """A scaling method with its formats.

    Attributes:
        name: tensorwise, rowwise or blockwise.
        gradient_dtype: format of gradients of outputs. Values and weights are E4M3.
        implementation: implementation of the op fp8_cast, which casts a matrix with one scale.
    """

    name: Literal["tensorwise", "rowwise", "blockwise"]
    gradient_dtype: torch.dtype
    implementation: str = "torch"

    def shared(self, shape: torch.Size, *, is_weight: bool = False) -> tuple[int, int]:
        """Return the rows and columns of a matrix [R, K] that share a scale."""
        match self.name:
            case "tensorwise":
                return shape[0], shape[1]
            case "rowwise":
                return 1, shape[1]
        return (BLOCK if is_weight else 1), BLOCK


SCALINGS = {
    "tensorwise": Scaling("tensorwise", E5M2),
    "rowwise": Scaling("rowwise", E4M3),
    "blockwise": Scaling("blockwise", E4M3),
}
VALUE_DTYPE = E4M3
