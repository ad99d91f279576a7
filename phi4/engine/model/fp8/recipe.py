"""Which numbers of a linear layer share a scale, and in which format its three products read them.

One decision, stated once: the products are y = x w^T, dx = dy w and dw = dy^T x, and each factor is
cast along what its product sums over.
"""

from dataclasses import dataclass
from typing import Literal

import torch

from phi4.config.fp8_rules import FP8_BLOCK
from phi4.engine.model.fp8.scales import E4M3, E5M2

BLOCK = FP8_BLOCK


@dataclass(frozen=True)
class Scaling:
    """A way to scale, and the formats that go with it.

    Attributes:
        name: tensorwise, rowwise or blockwise.
        gradient_dtype: of gradients of outputs. Values and weights are E4M3.
        implementation: of the op fp8_cast, which casts a matrix with one scale.
    """

    name: Literal["tensorwise", "rowwise", "blockwise"]
    gradient_dtype: torch.dtype
    implementation: str = "torch"

    def shared(self, shape: torch.Size, *, is_weight: bool = False) -> tuple[int, int]:
        """Rows and columns of a matrix [R, K] that share a scale."""
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
