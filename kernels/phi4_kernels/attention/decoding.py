"""Decoding: attention of a few new queries per sequence to cached keys, forward only.

It is separate from `attention` because the work differs: a sequence has too few queries to fill a
tile, too many keys for one program, and its keys are in blocks of a cache.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from phi4_kernels import dispatch
from phi4_kernels.attention import torch_decode
from phi4_kernels.attention.arguments import (
    Attention,
    check_head_dim,
    checked,
    fake_forward,
    for_implementation,
)
from phi4_kernels.attention.block_table import BlockTable
from phi4_kernels.autograd import without_autocast
from phi4_kernels.operators import register

# Shape legend: T queries, P slots, N query heads, K key-value heads, D head dim.


def attention_decode(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    table: BlockTable,
    *,
    causal: bool = True,
    scale: float | None = None,
    implementation: str = "auto",
) -> Attention:
    """softmax(scale * q k^T) v over the cached keys of each query's sequence.

    Any number of queries is supported, but the keys are read once per 16 pairs of a query and a
    head of its group. In Triton the result of a sequence is bitwise independent of the other
    sequences of the call.

    Args:
        q: [T, N, D] or by group [T, K, N / K, D], as for attention.
        keys, values: [P, K, D], the whole cache; Triton reads the sequences' blocks in place.
        table: which slots hold the keys of each sequence. On a GPU the buffers grow with
            `max_length`: fp32, ceil(max_length / 256) * T * N * (D + 2).
        causal: the last query of a sequence sees all of its keys, the one before it one key fewer;
            else every query sees all keys, like several samples of one prompt.
        scale: as for attention.
        implementation: see dispatch.choose; `gluon` does not implement decoding.

    Returns:
        out and lse, without a gradient. Results over parts of the keys merge by their lse.

    Raises:
        DtypeError, ShapeError, DeviceError, ImplementationError: see errors.
        PositionError: the table exceeds the queries or the cache. A table on a GPU is only checked
            under PHI4_KERNELS_DEBUG=1.
    """
    run = plan_decode(
        q, keys, values, table, causal=causal, scale=scale, implementation=implementation
    )
    return run(q, keys, values)


def plan_decode(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    table: BlockTable,
    *,
    causal: bool = True,
    scale: float | None = None,
    implementation: str = "auto",
) -> Callable[[Tensor, Tensor, Tensor], Attention]:
    """`attention_decode` for all layers of a step: checks and dispatch run once.

    For a step of few queries they take longer than the attention.

    Args:
        q, keys, values: of one layer.
        table, causal, scale, implementation: as for attention_decode.

    Returns:
        A function of q, keys and values that are like these in shape, strides, dtype and device,
        which it does not check. It runs without a gradient and without autocast.

    Raises:
        As attention_decode.
    """
    scale = checked(q, keys, values, table, scale)
    name = dispatch.resolve("attention", implementation, q.device, "decode")
    check_head_dim(q, name)
    where = (table.q_offsets, table.blocks, table.lengths, table.block_tokens)
    if name == "torch" and not torch.compiler.is_compiling():
        # An operator's call costs more than PyTorch's attention of a single query.
        attend = torch_decode.decode_plan(q, *where, causal, scale)
    else:
        rest = (*where, table.max_length, causal, scale, name)

        def attend(q: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
            return _decode(for_implementation(q, name), keys, values, *rest)

    @without_autocast
    def run(q: Tensor, keys: Tensor, values: Tensor) -> Attention:
        with torch.no_grad():
            return Attention(*attend(q, keys, values))

    return run


_decode = register(
    "attention",
    "decode",
    "attention_decode(Tensor q, Tensor keys, Tensor values, Tensor q_offsets, Tensor blocks, "
    "Tensor lengths, SymInt block_tokens, SymInt max_length, bool causal, float scale) "
    "-> (Tensor out, Tensor lse)",
    lambda q, *others: fake_forward(q),
)
