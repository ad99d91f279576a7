"""Keys and values of this rank's layers in blocks, and attention over them.

A slot is the place of one token. The torch implementation reads keys that lie side by side, so the
slots of every row are gathered before attention.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from phi4_kernels.attention import Ranges, attention_forward

from phi4.engine.generation.blocks import BlockCopy

# Shape legend: P slots, T new tokens, U keys of all rows, N query heads and K key-value heads per
# tensor rank, D head dim.


@dataclass(frozen=True)
class CacheRow:
    """One sequence in a forward pass.

    Attributes:
        num_new: tokens that this pass computes, the last ones of `slots`.
        slots: int64, of all its tokens up to those, in order.
    """

    num_new: int
    slots: np.ndarray


class KeyValueCache:
    """Zeroed keys and values, [P, K, D] each per layer.

    Args:
        layer_numbers: megatron-core's, of this rank.
        num_blocks, block_tokens: as the block pool's; P is their product.
        num_heads: key-value heads of this rank.
        head_dim: D.
        dtype: of the model's activations.
        device: of the model.
    """

    def __init__(
        self,
        layer_numbers: Sequence[int],
        num_blocks: int,
        block_tokens: int,
        num_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.block_tokens = block_tokens
        shape = (num_blocks * block_tokens, num_heads, head_dim)
        self.keys = {i: torch.zeros(shape, dtype=dtype, device=device) for i in layer_numbers}
        self.values = {i: torch.zeros(shape, dtype=dtype, device=device) for i in layer_numbers}

    @property
    def num_bytes(self) -> int:
        """Memory of all keys and values."""
        tensors = (*self.keys.values(), *self.values.values())
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def copy(self, copies: Sequence[BlockCopy]) -> None:
        """Copy blocks in every layer; no block is both a source and a target."""
        if not copies:
            return
        for tensor in (*self.keys.values(), *self.values.values()):
            blocks = tensor.unflatten(0, (-1, self.block_tokens))
            blocks[[copy.target for copy in copies]] = blocks[[copy.source for copy in copies]]


class StepAttention:
    """`CachedAttention` of one forward pass.

    Rows with one new token come first: such a token sees all keys of its row, which needs no causal
    mask, and rows of one length are one call of the torch implementation.

    Args:
        cache: holds all earlier tokens of the rows, and gets the new ones.
        rows: in the order of the new tokens; those with one new token first.
        device: of the cache.

    Raises:
        ValueError: a row with one new token follows one with several.
    """

    def __init__(
        self, cache: KeyValueCache, rows: Sequence[CacheRow], device: torch.device
    ) -> None:
        num_single = sum(row.num_new == 1 for row in rows)
        if any(row.num_new != 1 for row in rows[:num_single]):
            raise ValueError("rows with one new token must come before those with several")
        self._cache = cache
        self._new_T = _joined([row.slots[-row.num_new :] for row in rows], device)
        parts = (rows[:num_single], False), (rows[num_single:], True)
        self._parts = [_Part(part, causal, device) for part, causal in parts if part]

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
        """See `CachedAttention.attend`."""
        keys_PKD, values_PKD = self._cache.keys[layer_number], self._cache.values[layer_number]
        keys_PKD.index_copy_(0, self._new_T, k_TKD)
        values_PKD.index_copy_(0, self._new_T, v_TKD)
        options = {"scale": scale, "implementation": implementation}
        queries = q_TND.split([part.num_queries for part in self._parts])
        outputs = [
            attention_forward(
                q_part,
                keys_PKD.index_select(0, part.slots_U),
                values_PKD.index_select(0, part.slots_U),
                part.ranges,
                causal=part.causal,
                **options,
            ).out
            for part, q_part in zip(self._parts, queries, strict=True)
        ]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


class _Part:
    """Rows that one call of the attention op serves."""

    def __init__(self, rows: Sequence[CacheRow], causal: bool, device: torch.device) -> None:
        self.causal = causal
        self.num_queries = sum(row.num_new for row in rows)
        self.slots_U = _joined([row.slots for row in rows], device)
        queries, keys = [0], [0]
        for row in rows:
            queries.append(queries[-1] + row.num_new)
            keys.append(keys[-1] + len(row.slots))
        self.ranges = Ranges.of(queries, keys[:-1], keys[1:], device)


def _joined(slots: Sequence[np.ndarray], device: torch.device) -> torch.Tensor:
    return torch.from_numpy(np.concatenate(slots)).to(device, non_blocking=True)
