"""What core attention asks of a key-value cache; `phi4.engine.generation` has the cache."""

from typing import Protocol

import torch

# Shape legend: T new tokens, N query heads and K key-value heads per tensor rank, D head dim.


class CachedAttention(Protocol):
    """Attention of one forward pass over new tokens and the cached ones before them."""

    def attend(
        self,
        layer_number: int,
        q_TND: torch.Tensor,
        k_TKD: torch.Tensor,
        v_TKD: torch.Tensor,
        *,
        scale: float,
        implementation: str,
    ) -> torch.Tensor:
        """Cache the keys and values of the new tokens, then attend.

        Args:
            layer_number: megatron-core's, from 1 over the whole model.
            q_TND: [T, N, D] or by group [T, K, N / K, D], rotated.
            k_TKD: rotated.
            v_TKD: values.
            scale: of the scores.
            implementation: of the attention op.

        Returns:
            [T, N, D].
        """
        ...
