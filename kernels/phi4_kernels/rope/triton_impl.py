"""RoPE in Triton: one program per token, one tile per kind of head, any strides.

The angles of a token are read once for all of its heads. The kernels are independent of the layout:
they get q, k and v as strided views, which covers both head orders. With document boundaries, a
program finds its token's document by bisection, so the grid is the number of tokens.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from phi4_kernels import launch
from phi4_kernels.launch import Launch
from phi4_kernels.rope.layout import QKVLayout

# By elements of the largest tile: heads, each padded to a power of two, times half the rotary dim.
TILES = (Launch(512, 0, 1), Launch(4096, 0, 4), Launch(8192, 0, 8), Launch(32768, 0, 16))


@triton.jit
def _position(
    token, ids_ptr, boundaries_ptr, num_documents, steps, IDS: tl.constexpr, DOCUMENTS: tl.constexpr
):
    """The token's place in its document."""
    if IDS:
        return tl.load(ids_ptr + token).to(tl.int64)
    elif DOCUMENTS:
        # Invariant: boundaries[low] <= token < boundaries[high].
        # Bisection over the cumulative lengths: the document of the token.
        low = token * 0
        high = low + num_documents
        for _ in range(steps):
            middle = (low + high) // 2
            started = tl.load(boundaries_ptr + middle) <= token
            low = tl.where(started, middle, low)
            high = tl.where(started, high, middle)
        # Positions restart with every document.
        return token - tl.load(boundaries_ptr + low)
    else:
        return token


@triton.jit
def _rotate(
    source_ptr,
    target_ptr,
    stride_source_group,
    stride_source_head,
    stride_target_group,
    stride_target_head,
    cos,
    sin,
    HEADS: tl.constexpr,
    PER_GROUP: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
):
    """All heads of a token: the first 2 * HALF dims of each are HALF pairs (d, d + HALF)."""
    heads = tl.arange(0, BLOCK_HEADS)[:, None]
    cols = tl.arange(0, BLOCK_HALF)[None, :]
    # Head h of q is query h % PER_GROUP of group h // PER_GROUP; k and v have one head per group.
    group = heads // PER_GROUP
    member = heads % PER_GROUP
    mask = (heads < HEADS) & (cols < HALF)
    source = source_ptr + group * stride_source_group + member * stride_source_head + cols
    target = target_ptr + group * stride_target_group + member * stride_target_head + cols
    # a = x_d, b = x_(d + HALF), and t the angle of the position at frequency d:
    a = tl.load(source, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(source + HALF, mask=mask, other=0.0).to(tl.float32)
    # a' = a cos t - b sin t, b' = a sin t + b cos t
    tl.store(target, (a * cos - b * sin).to(target_ptr.dtype.element_ty), mask=mask)
    tl.store(target + HALF, (b * cos + a * sin).to(target_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _copy(
    source_ptr,
    target_ptr,
    stride_source_group,
    stride_source_head,
    stride_target_group,
    stride_target_head,
    HEADS: tl.constexpr,
    PER_GROUP: tl.constexpr,
    COLS: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    """What is not rotated: values, and dims past the rotary ones."""
    heads = tl.arange(0, BLOCK_HEADS)[:, None]
    cols = tl.arange(0, BLOCK_COLS)[None, :]
    group = heads // PER_GROUP
    member = heads % PER_GROUP
    mask = (heads < HEADS) & (cols < COLS)
    source = source_ptr + group * stride_source_group + member * stride_source_head + cols
    target = target_ptr + group * stride_target_group + member * stride_target_head + cols
    tl.store(target, tl.load(source, mask=mask), mask=mask)


@triton.jit
def _angles(table_ptr, position, num_positions, HALF: tl.constexpr, BLOCK_HALF: tl.constexpr):
    """cos or sin of the token's position by frequency; NaN if the tables do not reach it."""
    cols = tl.arange(0, BLOCK_HALF)[None, :]
    # NaN instead of an error: checking positions on the host would need a synchronisation.
    mask = (cols < HALF) & (position >= 0) & (position < num_positions)
    return tl.load(table_ptr + position * HALF + cols, mask=mask, other=float("nan"))


@triton.jit
def _rope_forward_kernel(
    q_ptr,
    k_ptr,
    cos_ptr,
    sin_ptr,
    num_positions,
    ids_ptr,
    boundaries_ptr,
    num_documents,
    steps,
    stride_q,
    stride_q_group,
    stride_q_head,
    stride_k,
    stride_k_group,
    GROUPS: tl.constexpr,
    QUERIES: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    IDS: tl.constexpr,
    DOCUMENTS: tl.constexpr,
):
    """q and k of a token, in place."""
    token = tl.program_id(0).to(tl.int64)
    position = _position(token, ids_ptr, boundaries_ptr, num_documents, steps, IDS, DOCUMENTS)
    cos = _angles(cos_ptr, position, num_positions, HALF, BLOCK_HALF)
    sin = _angles(sin_ptr, position, num_positions, HALF, BLOCK_HALF)
    q = q_ptr + token * stride_q
    k = k_ptr + token * stride_k
    sq_g = stride_q_group
    sq_h = stride_q_head
    sk_g = stride_k_group
    # In place: each element is read and written by the thread that holds its pair.
    _rotate(
        q, q, sq_g, sq_h, sq_g, sq_h, cos, sin, GROUPS * QUERIES, QUERIES, HALF,
        BLOCK_HEADS, BLOCK_HALF,
    )  # fmt: skip
    _rotate(k, k, sk_g, 0, sk_g, 0, cos, sin, GROUPS, 1, HALF, BLOCK_GROUPS, BLOCK_HALF)


@triton.jit
def _rope_backward_kernel(
    dq_ptr,
    dk_ptr,
    dv_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    cos_ptr,
    sin_ptr,
    num_positions,
    ids_ptr,
    boundaries_ptr,
    num_documents,
    steps,
    stride_dq,
    stride_dq_group,
    stride_dq_head,
    stride_dk,
    stride_dk_group,
    stride_dv,
    stride_dv_group,
    stride_packed,
    stride_q_group,
    stride_q_head,
    stride_k_group,
    GROUPS: tl.constexpr,
    QUERIES: tl.constexpr,
    HALF: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    IDS: tl.constexpr,
    DOCUMENTS: tl.constexpr,
):
    """Gradients of a token, rotated back and packed as QKV was."""
    token = tl.program_id(0).to(tl.int64)
    position = _position(token, ids_ptr, boundaries_ptr, num_documents, steps, IDS, DOCUMENTS)
    cos = _angles(cos_ptr, position, num_positions, HALF, BLOCK_HALF)
    # The inverse of a rotation by t is one by -t: the sine changes its sign.
    sin = -_angles(sin_ptr, position, num_positions, HALF, BLOCK_HALF)
    dq = dq_ptr + token * stride_dq
    dk = dk_ptr + token * stride_dk
    dv = dv_ptr + token * stride_dv
    q = q_ptr + token * stride_packed
    k = k_ptr + token * stride_packed
    v = v_ptr + token * stride_packed
    sd_g = stride_dq_group
    sd_h = stride_dq_head
    sq_g = stride_q_group
    sq_h = stride_q_head
    sk_g = stride_k_group
    HEADS: tl.constexpr = GROUPS * QUERIES
    REST: tl.constexpr = HEAD_DIM - 2 * HALF
    _rotate(dq, q, sd_g, sd_h, sq_g, sq_h, cos, sin, HEADS, QUERIES, HALF, BLOCK_HEADS, BLOCK_HALF)
    _rotate(dk, k, stride_dk_group, 0, sk_g, 0, cos, sin, GROUPS, 1, HALF, BLOCK_GROUPS, BLOCK_HALF)
    _copy(dv, v, stride_dv_group, 0, sk_g, 0, GROUPS, 1, HEAD_DIM, BLOCK_GROUPS, BLOCK_DIM)
    # Partial rotary: the dims past 2 * HALF pass through.
    if REST > 0:
        dq += 2 * HALF
        q += 2 * HALF
        _copy(dq, q, sd_g, sd_h, sq_g, sq_h, HEADS, QUERIES, REST, BLOCK_HEADS, BLOCK_REST)
        dk += 2 * HALF
        k += 2 * HALF
        _copy(dk, k, stride_dk_group, 0, sk_g, 0, GROUPS, 1, REST, BLOCK_GROUPS, BLOCK_REST)


@cache
def _tiles(groups: int, queries: int, half: int) -> dict[str, int]:
    blocks = (groups, groups * queries, half)
    # Triton's tiles are powers of two; masks cut them to size.
    block_groups, block_heads, block_half = map(triton.next_power_of_2, blocks)
    row = launch.pick(TILES, block_heads * block_half)
    return {
        "GROUPS": groups,
        "QUERIES": queries,
        "HALF": half,
        "BLOCK_GROUPS": block_groups,
        "BLOCK_HEADS": block_heads,
        "BLOCK_HALF": block_half,
        "num_warps": row.num_warps,
    }


def _where(position_ids: Tensor | None, cu_seqlens: Tensor | None) -> tuple[tuple, dict[str, bool]]:
    num_documents = 0 if cu_seqlens is None else cu_seqlens.numel() - 1
    # Steps of the bisection: bits of the number of documents.
    arguments = (position_ids, cu_seqlens, num_documents, num_documents.bit_length())
    return arguments, {"IDS": position_ids is not None, "DOCUMENTS": cu_seqlens is not None}


def forward(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor | None,
    cu_seqlens: Tensor | None,
) -> None:
    """Rotate the views q [T, G, Q, D] and k [T, G, D] in place."""
    if not q.numel():
        return
    arguments, kind = _where(position_ids, cu_seqlens)
    _rope_forward_kernel[(q.shape[0],)](
        q,
        k,
        cos,
        sin,
        cos.shape[0],
        *arguments,
        *q.stride()[:3],
        *k.stride()[:2],
        **_tiles(*q.shape[1:3], cos.shape[1]),
        **kind,
    )


def backward(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    groups: int,
    queries: int,
    head_dim: int,
    order: str,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor | None,
    cu_seqlens: Tensor | None,
) -> Tensor:
    """Rotate dq and dk back and pack them with dv: [T, width]."""
    layout = QKVLayout(groups, queries, head_dim, order)
    packed = torch.empty((dq.shape[0], layout.width), dtype=dq.dtype, device=dq.device)
    if not packed.numel():
        return packed
    q, k, v = layout.split(packed)
    arguments, kind = _where(position_ids, cu_seqlens)
    _rope_backward_kernel[(dq.shape[0],)](
        dq,
        dk,
        dv,
        q,
        k,
        v,
        cos,
        sin,
        cos.shape[0],
        *arguments,
        *dq.stride()[:3],
        *dk.stride()[:2],
        *dv.stride()[:2],
        packed.stride(0),
        *q.stride()[1:3],
        k.stride(1),
        HEAD_DIM=head_dim,
        BLOCK_DIM=triton.next_power_of_2(head_dim),
        BLOCK_REST=triton.next_power_of_2(max(head_dim - 2 * cos.shape[1], 1)),
        **_tiles(*q.shape[1:3], cos.shape[1]),
        **kind,
    )
    return packed
