"""Decoding: attention of a few new queries per range to the keys before them, forward only.

The definition is `attention_forward` with causal ranges. It has a form of its own because its work
is not: a range has too few queries to fill a tile, and too many keys for one program.
"""

import torch
from torch import Tensor

from phi4_kernels import dispatch
from phi4_kernels.attention.arguments import (
    Attention,
    check_head_dim,
    checked,
    fake_forward,
    for_implementation,
)
from phi4_kernels.attention.ranges import Ranges
from phi4_kernels.autograd import without_autocast
from phi4_kernels.operators import register

# Shape legend: T queries, U keys, N query heads, K key-value heads, D head dim.


@without_autocast
def attention_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ranges: Ranges,
    *,
    scale: float | None = None,
    implementation: str = "auto",
) -> Attention:
    """`attention_forward` with causal ranges, for ranges of few queries and many keys.

    Any ranges are right, but the keys are read once per 16 pairs of a query and a head of its
    group. In Triton the bits of a range do not depend on the other ranges of the call.

    Args:
        q, k, v, scale: as for attention.
        ranges: as for attention; `max_keys` sets how many programs share a range's keys. With it
            the buffers grow: fp32, ceil(max_keys / 256) * T * N * (D + 2).
        implementation: see dispatch.choose; `gluon` has no such form.

    Returns:
        out and lse, without a gradient.

    Raises:
        DtypeError, ShapeError, DeviceError, ImplementationError, PositionError: as for attention.
    """
    scale = checked(q, k, v, ranges, scale)
    name = dispatch.resolve("attention", implementation, q.device, "decode")
    check_head_dim(q, name)
    q = for_implementation(q, name)
    where = (ranges.q_offsets, ranges.k_starts, ranges.k_ends)
    with torch.no_grad():
        return Attention(
            *_decode(q, k, v, *where, ranges.max_queries, ranges.max_keys, scale, name)
        )


_decode = register(
    "attention",
    "decode",
    "attention_decode(Tensor q, Tensor k, Tensor v, Tensor q_offsets, Tensor k_starts, "
    "Tensor k_ends, SymInt max_queries, SymInt max_keys, float scale) -> (Tensor out, Tensor lse)",
    lambda q, *others: fake_forward(q),
)
