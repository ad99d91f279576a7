"""Random inputs of a decoding case: the cache, its block table and the queries.

Blocks are in random order, with unused blocks between them. Memory that no sequence may read is
NaN: the unused blocks, the slots after a sequence's last key, and a query at the end that belongs
to no sequence. Table entries after a sequence's last block are not valid block numbers.
"""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from phi4_kernels.attention.block_table import BlockTable
from phi4_kernels.launch import ceil_div
from phi4_kernels.registry import CallInputs, Case
from phi4_kernels.testing import random_inputs

_DEFAULTS = {"block_tokens": 16, "shared": 0, "causal": True, "high": 1.0, "spread": 1.0}
_NO_BLOCK = 2**31 - 1
_SPARE_BLOCKS = 2


def cached(name: str, queries: Sequence[int], lengths: Sequence[int], **sizes: Any) -> Case:
    """A case of sequences with these numbers of queries and keys. They share their first `shared`
    blocks; `strided` leaves gaps between rows."""
    strided = sizes.pop("strided", False)
    where = {"tokens": sum(queries), "queries": tuple(queries), "lengths": tuple(lengths)}
    return Case(name, where | _DEFAULTS | sizes, strided)


def _blocks(case: Case) -> tuple[Tensor, int]:
    """The table, one column wider than the longest sequence needs, and the number of blocks."""
    sizes = case.sizes
    counts = [ceil_div(length, sizes["block_tokens"]) for length in sizes["lengths"]]
    total = sum(counts) + _SPARE_BLOCKS
    numbers = torch.randperm(total, generator=case.generator(), dtype=torch.int32)
    blocks = torch.full((len(counts), max(counts, default=0) + 1), _NO_BLOCK, dtype=torch.int32)
    for row, part in zip(blocks, numbers.split([*counts, _SPARE_BLOCKS]), strict=False):
        row[: len(part)] = part
    shared = sizes["shared"]
    blocks[:, :shared] = blocks[:1, :shared]
    return blocks, total


def _held(blocks: Tensor, lengths: Sequence[int], block_tokens: int, total: int) -> Tensor:
    """[P], bool: the slots that hold a key."""
    held = torch.zeros(total, block_tokens, dtype=torch.bool)
    for row, length in zip(blocks.tolist(), lengths, strict=True):
        for key in range(length):
            held[row[key // block_tokens], key % block_tokens] = True
    return held.flatten()


def drawn_cache(case: Case, dtype: torch.dtype) -> CallInputs:
    """q, keys and values of a case, and its table."""
    sizes = case.sizes
    blocks, total = _blocks(case)
    offsets = list(accumulate(sizes["queries"], initial=0))
    drawn = partial(
        random_inputs.rows, dtype=dtype, generator=case.generator(), strided=case.strided
    )
    of_queries = sizes["tokens"] + 1, sizes["heads"], sizes["dim"]
    of_keys = total * sizes["block_tokens"], sizes["groups"], sizes["dim"]
    tensors = {
        "q": drawn(of_queries, high=sizes["high"]),
        "keys": drawn(of_keys, low=1.0, high=1.0),
        "values": drawn(of_keys, low=1 / sizes["spread"], high=sizes["spread"]),
    }
    held = _held(blocks, sizes["lengths"], sizes["block_tokens"], total)
    # Slots of no sequence are NaN, so that reading them shows in the result.
    tensors["q"][-1] = torch.nan
    for name in ("keys", "values"):
        tensors[name][~held] = torch.nan
    constants = {
        "offsets": torch.tensor(offsets, dtype=torch.int32),
        "blocks": blocks,
        "lengths": torch.tensor(sizes["lengths"], dtype=torch.int32),
        "block_tokens": sizes["block_tokens"],
        "longest": max(sizes["lengths"], default=0),
        "causal": sizes["causal"],
        "scale": sizes["dim"] ** -0.5,
    }
    return CallInputs(tensors, constants)


def over_table(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` with the table's tensors as separate arguments, which the checks place in
    memory."""

    def run(
        q: Tensor,
        keys: Tensor,
        values: Tensor,
        *,
        offsets: Tensor,
        blocks: Tensor,
        lengths: Tensor,
        block_tokens: int,
        longest: int,
        **others: Any,
    ) -> Any:
        table = BlockTable(offsets, blocks, lengths, block_tokens, longest)
        return function(q, keys, values, table, **others)

    return run
