"""Keys and values of this rank's layers in blocks, and attention over them.

A slot holds one token. Rows with one new token read their keys through a table of their blocks; the
keys of longer rows, which are few, are gathered before attention.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate, groupby, takewhile

import numpy as np
import torch
from phi4_kernels.attention import Attention, BlockTable, Ranges, attention_forward, plan_decode

from phi4.engine.generation.blocks import BlockCopy, slots_of
from phi4.engine.generation.steps import StepRow
from phi4.engine.model.attention import CoreAttention
from phi4.engine.model.implementations import (
    decoding_implementation,
    gathering_implementation,
)

# Shape legend: P slots, T new tokens, U keys of all rows, N query heads and K key-value heads per
# tensor rank, D head dim.


class KeyValueCache:
    """Zeroed keys and values, [P, K, D] each per layer.

    Args:
        layer_numbers: megatron-core's numbers of this rank's layers.
        num_blocks, block_tokens: as the block pool's; P is their product.
        num_heads: key-value heads of this rank.
        head_dim: D.
        dtype: dtype of the model's activations.
        device: device of the model.
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
        self.block_tokens, self.device = block_tokens, device
        shape = (num_blocks * block_tokens, num_heads, head_dim)
        self.keys = {i: torch.zeros(shape, dtype=dtype, device=device) for i in layer_numbers}
        self.values = {i: torch.zeros(shape, dtype=dtype, device=device) for i in layer_numbers}

    def of_layer(self, layer_number: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys and values of one layer."""
        return self.keys[layer_number], self.values[layer_number]

    def copy(self, copies: Sequence[BlockCopy]) -> None:
        """Copy blocks in every layer; no block is both a source and a target."""
        if not copies:
            return
        for tensor in (*self.keys.values(), *self.values.values()):
            blocks = tensor.unflatten(0, (-1, self.block_tokens))
            blocks[[copy.target for copy in copies]] = blocks[[copy.source for copy in copies]]


_LEAST_SAVED_TOKENS = 512
"""Number of keys whose reading must be saved for a second call and a merge to pay off."""


class StepAttention:
    """`CachedAttention` of one forward pass.

    Rows with one new token come first: such a token attends to all keys of its row, so these rows
    need no causal mask and are one call.

    Args:
        cache: holds all earlier tokens of the rows, and receives the new ones.
        rows: in the order of the new tokens; those with one new token first.
        alone: one call per row.

    Raises:
        ValueError: a row with one new token follows one with several.
    """

    def __init__(self, cache: KeyValueCache, rows: Sequence[StepRow], alone: bool = False) -> None:
        num_single = sum(len(row.tokens) == 1 for row in rows)
        if any(len(row.tokens) > 1 for row in rows[:num_single]):
            raise ValueError("rows with one new token must come before those with several")
        self._cache = cache
        size, device = cache.block_tokens, cache.device
        # For rows with one token without the array that `slots_of` makes.
        new = [row.blocks[row.start // size] * size + row.start % size for row in rows[:num_single]]
        longer = [slots_of(row.blocks, size, row.start, row.end) for row in rows[num_single:]]
        self._new_T = _on_device(np.concatenate((np.array(new, dtype=np.int64), *longer)), device)
        singles = [[row] for row in rows[:num_single]] if alone else [rows[:num_single]]
        self._parts: list[_Singles | _Chunks] = [
            _Singles(one, size, device, shares=not alone) for one in singles if one
        ]
        if num_single < len(rows):
            self._parts.append(_Chunks(rows[num_single:], size, device))

    def attend(
        self, core: CoreAttention, q_TND: torch.Tensor, k_TKD: torch.Tensor, v_TKD: torch.Tensor
    ) -> torch.Tensor:
        """See `CachedAttention.attend`."""
        keys_PKD, values_PKD = self._cache.of_layer(core.layer_number)
        keys_PKD.index_copy_(0, self._new_T, k_TKD)
        values_PKD.index_copy_(0, self._new_T, v_TKD)
        if len(self._parts) == 1:
            return self._parts[0].attend(core, q_TND, keys_PKD, values_PKD)
        queries = q_TND.split([part.num_queries for part in self._parts])
        outputs = [
            part.attend(core, q, keys_PKD, values_PKD)
            for part, q in zip(self._parts, queries, strict=True)
        ]
        return torch.cat(outputs)


class _Singles:
    """Rows with one new token each, whose keys are read in place.

    Keys shared by neighbouring rows are attended to for all of them at once, as one sequence with
    several queries, and merged with each row's own keys. 100 samples of a prompt thus read it once.
    """

    def __init__(
        self, rows: Sequence[StepRow], block_tokens: int, device: torch.device, shares: bool
    ) -> None:
        self.num_queries = len(rows)
        shares = shares and len({row.blocks[0] for row in rows}) < len(rows)
        groups = list(_groups(rows, block_tokens)) if shares else [(len(rows), 0)]
        skipped = [num_shared for num_rows, num_shared in groups for _ in range(num_rows)]
        blocks = [row.blocks[n:] for row, n in zip(rows, skipped, strict=True)]
        lengths = [row.end - n * block_tokens for row, n in zip(rows, skipped, strict=True)]
        own = BlockTable.of(blocks, lengths, block_tokens, device=device)
        self._parts = [_TableAttention(own, causal=True)]
        if any(skipped):
            starts = accumulate((num_rows for num_rows, _ in groups), initial=0)
            shared = BlockTable.of(
                [rows[i].blocks[:n] for i, (_, n) in zip(starts, groups, strict=False)],
                [n * block_tokens for _, n in groups],
                block_tokens,
                [num_rows for num_rows, _ in groups],
                device,
            )
            self._parts.append(_TableAttention(shared, causal=False))

    def attend(
        self,
        core: CoreAttention,
        q_RND: torch.Tensor,
        keys_PKD: torch.Tensor,
        values_PKD: torch.Tensor,
    ) -> torch.Tensor:
        """[R, N, D]."""
        found = [part.attend(core, q_RND, keys_PKD, values_PKD) for part in self._parts]
        if len(found) == 1:
            return found[0].out
        total_RN = torch.logaddexp(*(part.lse for part in found))
        weighted = [part.out * (part.lse - total_RN).exp().unsqueeze(-1) for part in found]
        return (weighted[0] + weighted[1]).to(q_RND.dtype)


class _TableAttention:
    """Attention through one table; layers are alike, so the first one's plan is reused."""

    def __init__(self, table: BlockTable, *, causal: bool) -> None:
        self._table, self._causal = table, causal
        self._run: Callable[..., Attention] | None = None

    def attend(
        self, core: CoreAttention, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> Attention:
        if self._run is None:
            self._run = plan_decode(
                q,
                keys,
                values,
                self._table,
                causal=self._causal,
                scale=core.scale,
                implementation=decoding_implementation(core.implementation),
            )
        return self._run(q, keys, values)


def _groups(rows: Sequence[StepRow], block_tokens: int) -> Iterator[tuple[int, int]]:
    """Return (rows, shared blocks) of neighbours that begin with the same block.

    Shared blocks are full: a row writes to its last block, which it owns alone.
    """
    for _, neighbours in groupby(rows, key=lambda row: row.blocks[0]):
        blocks = [tuple(row.blocks) for row in neighbours]
        # All lists are between the smallest and the greatest, so blocks shared by these are shared
        # by all.
        pairs = zip(min(blocks), max(blocks), strict=False)
        num_shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        saved_tokens = (len(blocks) - 1) * num_shared * block_tokens
        yield len(blocks), num_shared if saved_tokens >= _LEAST_SAVED_TOKENS else 0


class _Chunks:
    """Rows with several new tokens, whose keys are gathered."""

    def __init__(self, rows: Sequence[StepRow], block_tokens: int, device: torch.device) -> None:
        self.num_queries = sum(len(row.tokens) for row in rows)
        held = [slots_of(row.blocks, block_tokens, 0, row.end) for row in rows]
        self._slots_U = _on_device(np.concatenate(held), device)
        queries, keys = [0], [0]
        for row in rows:
            queries.append(queries[-1] + len(row.tokens))
            keys.append(keys[-1] + row.end)
        self._ranges = Ranges.of(queries, keys[:-1], keys[1:], device)

    def attend(
        self,
        core: CoreAttention,
        q_TND: torch.Tensor,
        keys_PKD: torch.Tensor,
        values_PKD: torch.Tensor,
    ) -> torch.Tensor:
        """[T, N, D]."""
        keys = keys_PKD.index_select(0, self._slots_U)
        values = values_PKD.index_select(0, self._slots_U)
        implementation = gathering_implementation(core.implementation)
        options = {"scale": core.scale, "implementation": implementation}
        return attention_forward(q_TND, keys, values, self._ranges, **options).out


def _on_device(array: np.ndarray, device: torch.device) -> torch.Tensor:
    return torch.from_numpy(array).to(device, non_blocking=True)
