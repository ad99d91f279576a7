"""Attention over rows split over context ranks: keys and values are sent, queries stay.

Both implementations compute the same sums and keep only local q, k and v, the result and its
log-sum-exp; remote keys and values are fetched again in backward. Gradients of k and v are
accumulated in fp32.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.mappings import (
    gather_from_sequence_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from phi4_kernels.attention import Attention, attention_backward, attention_forward

from phi4.engine.model.document_ranges import Visible

# Shape legend: S local columns, a rank's two chunks after each other; B rows, N query heads, K
# key-value heads, D head dim; T = B * S / 2 queries of one chunk, rows in order; U = B * columns
# keys of a block, rows in order; 2 of k and v.

Tensor = torch.Tensor


class AllGatherAttention(torch.autograd.Function):
    """Every rank gathers all keys and values of its rows.

    Collectives: forward one all-gather of k and v over the context group, 2 S B K D e bytes from
    every rank, e of an element; backward the same again and one reduce-scatter of 8 S B K D bytes
    from every rank to every other.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q_SBND: Tensor,
        k_SBKD: Tensor,
        v_SBKD: Tensor,
        visible: Visible,
        group: dist.ProcessGroup,
        options: dict[str, Any],
    ) -> Tensor:
        """[S, B, N, D]; options are `scale` and `implementation` of the op."""
        k_UKD, v_UKD = _gathered(k_SBKD, v_SBKD, group)
        parts = []
        for q_TND, ranges in zip(_chunks(q_SBND), visible[0], strict=True):
            assert ranges is not None, "among all keys a query sees its own"
            parts.append(attention_forward(q_TND, k_UKD, v_UKD, ranges, causal=True, **options))
        out_SBND = _joined([part.out for part in parts], q_SBND)
        ctx.save_for_backward(q_SBND, k_SBKD, v_SBKD, out_SBND, *(part.lse for part in parts))
        ctx.visible, ctx.group, ctx.options = visible, group, options
        return out_SBND

    @staticmethod
    def backward(ctx: Any, dout_SBND: Tensor):
        """Return the gradients of q, k and v."""
        q_SBND, k_SBKD, v_SBKD, out_SBND, *lse_TN = ctx.saved_tensors
        kv_2UKD = _gathered(k_SBKD, v_SBKD, ctx.group)
        dkv_2UKD = torch.zeros_like(kv_2UKD, dtype=torch.float32)
        dq_TND = []
        for dout, q, out, lse, ranges in zip(
            *map(_chunks, (dout_SBND, q_SBND, out_SBND)), lse_TN, ctx.visible[0], strict=True
        ):
            dq, *dkv = attention_backward(
                dout, q, kv_2UKD[0], kv_2UKD[1], out, lse, ranges, causal=True, **ctx.options
            )
            dq_TND.append(dq)
            _add(dkv_2UKD, dkv)
        dkv_2SBKD = _scattered(dkv_2UKD, k_SBKD, ctx.group)
        return _joined(dq_TND, q_SBND), *dkv_2SBKD.to(k_SBKD.dtype), None, None, None


class RingAttention(torch.autograd.Function):
    """Keys and values pass around the context ranks, and every rank merges the result of each
    block.

    While a block is attended to, the next one is in transfer. Backward passes the blocks around
    again, with their gradients one step behind; a block's gradient is accumulated in ring order,
    starting at its owner, so that it is bit-identical in every run. Blocks that share no document
    are forwarded but not computed.

    Collectives: point to point to the next context rank, from the previous one. Forward c - 1 times
    2 S B K D e bytes for c ranks, e of an element; backward the same and c times 8 S B K D bytes.
    Source: Liu et al. 2023 (Ring Attention), with the chunks of `Layout.context_chunks`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q_SBND: Tensor,
        k_SBKD: Tensor,
        v_SBKD: Tensor,
        visible: Visible,
        group: dist.ProcessGroup,
        options: dict[str, Any],
    ) -> Tensor:
        """[S, B, N, D]; options are `scale` and `implementation` of the op."""
        queries = _chunks(q_SBND)
        merged: list[Attention | None] = [None, None]
        blocks = _rotating(_local_rows(k_SBKD, v_SBKD), group)
        for step, (kv_2UKD, seen) in enumerate(zip(blocks, visible, strict=True)):
            for i, ranges in enumerate(seen):
                if ranges is not None:
                    k_UKD, v_UKD = kv_2UKD
                    part = attention_forward(
                        queries[i], k_UKD, v_UKD, ranges, causal=step == 0, **options
                    )
                    merged[i] = merge(merged[i], part)
        # Every query sees a key of the first block.
        parts = [part for part in merged if part is not None]
        out_SBND = _joined([part.out.to(q_SBND.dtype) for part in parts], q_SBND)
        ctx.save_for_backward(q_SBND, k_SBKD, v_SBKD, out_SBND, *(part.lse for part in parts))
        ctx.visible, ctx.group, ctx.options = visible, group, options
        return out_SBND

    @staticmethod
    def backward(ctx: Any, dout_SBND: Tensor):
        """Return the gradients of q, k and v."""
        q_SBND, k_SBKD, v_SBKD, out_SBND, *lse_TN = ctx.saved_tensors
        chunks = list(zip(*map(_chunks, (dout_SBND, q_SBND, out_SBND)), lse_TN, strict=True))
        dq_TND = [torch.zeros_like(q, dtype=torch.float32) for _, q, _, _ in chunks]
        blocks, arriving = _rotating(_local_rows(k_SBKD, v_SBKD), ctx.group), None
        for step, (kv_2UKD, seen) in enumerate(zip(blocks, ctx.visible, strict=True)):
            dkv_2UKD = torch.zeros_like(kv_2UKD, dtype=torch.float32)
            for (dout, q, out, lse), total, ranges in zip(chunks, dq_TND, seen, strict=True):
                if ranges is not None:
                    k_UKD, v_UKD = kv_2UKD
                    dq, *dkv = attention_backward(
                        dout, q, k_UKD, v_UKD, out, lse, ranges, causal=step == 0, **ctx.options
                    )
                    total += dq
                    _add(dkv_2UKD, dkv)
            if arriving is not None:
                dkv_2UKD = arriving.wait().add_(dkv_2UKD)
            arriving = _Transfer(dkv_2UKD, ctx.group)
        assert arriving is not None, "every ring has a block"
        dkv_2BSKD = arriving.wait().unflatten(1, (k_SBKD.shape[1], -1)).to(k_SBKD.dtype)
        dq_SBND = _joined([dq.to(q_SBND.dtype) for dq in dq_TND], q_SBND)
        return dq_SBND, *dkv_2BSKD.transpose(1, 2), None, None, None


def merge(so_far: Attention | None, part: Attention) -> Attention:
    """Merge the results of attention over two disjoint sets of keys, in fp32.

    Args:
        so_far: overwritten. Each of its queries saw at least one key, as in its own block; None for
            no result yet.
        part: its queries may see no key.

    Source: Milakov and Gimelshein 2018.
    """
    if so_far is None:
        return Attention(part.out.float(), part.lse)
    lse_TN = torch.logaddexp(so_far.lse, part.lse)
    kept, added = ((lse - lse_TN).exp().unsqueeze(-1) for lse in (so_far.lse, part.lse))
    return Attention(so_far.out.mul_(kept).add_(part.out * added), lse_TN)


class _Transfer:
    """Transfer of a block to the next rank of the ring, and of the previous rank's block to this
    one."""

    def __init__(self, block: Tensor, group: dist.ProcessGroup) -> None:
        rank, size = group.rank(), group.size()
        # Must stay alive until it has arrived.
        self._block, self._received = block, torch.empty_like(block)
        sends = dist.P2POp(dist.isend, block, group=group, group_peer=(rank + 1) % size)
        receives = dist.P2POp(dist.irecv, self._received, group=group, group_peer=(rank - 1) % size)
        self._works = dist.batch_isend_irecv([sends, receives])

    def wait(self) -> Tensor:
        """Return the previous rank's block."""
        for work in self._works:
            work.wait()
        return self._received


def _rotating(block: Tensor, group: dist.ProcessGroup) -> Iterator[Tensor]:
    """Yield this rank's block, the previous rank's, and so on; the next is fetched during use of
    the current one."""
    for remaining in reversed(range(group.size())):
        arriving = _Transfer(block, group) if remaining else None
        yield block
        if arriving is not None:
            block = arriving.wait()


def _chunks(x_SBND: Tensor) -> tuple[Tensor, ...]:
    """Return the two chunks of columns, each [B * S / 2, N, D] with its rows in order."""
    return tuple(chunk.transpose(0, 1).flatten(0, 1) for chunk in x_SBND.chunk(2))


def _joined(chunks_TND: list[Tensor], like_SBND: Tensor) -> Tensor:
    """Inverse of `_chunks`."""
    num_rows = like_SBND.shape[1]
    return torch.cat([x.unflatten(0, (num_rows, -1)).transpose(0, 1) for x in chunks_TND])


def _local_rows(k_SBKD: Tensor, v_SBKD: Tensor) -> Tensor:
    """Return k and v of this rank as [2, B * S, K, D]."""
    return torch.stack([x.transpose(0, 1) for x in (k_SBKD, v_SBKD)]).flatten(1, 2)


def _gathered(k_SBKD: Tensor, v_SBKD: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Return k and v of all ranks, columns in the order of the row, [2, B * S_row, K, D]."""
    size = group.size()
    local_2SBKD = torch.stack((k_SBKD, v_SBKD))
    by_rank = gather_from_sequence_parallel_region(local_2SBKD, group=group).chunk(size)
    halves = [rank_2SBKD.chunk(2, dim=1) for rank_2SBKD in by_rank]
    in_order = [first for first, _ in halves] + [second for _, second in reversed(halves)]
    return torch.cat([x.transpose(1, 2) for x in in_order], dim=2).flatten(1, 2)


def _scattered(x_2UKD: Tensor, like_SBKD: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Return sums over the ranks, from the layout of `_gathered` to this rank's columns, [2, S, B,
    K, D]."""
    size, num_rows = group.size(), like_SBKD.shape[1]
    chunks = x_2UKD.unflatten(1, (num_rows, -1)).transpose(1, 2).chunk(2 * size, dim=1)
    by_rank = [x for rank in range(size) for x in (chunks[rank], chunks[-1 - rank])]
    # [ranks * chunks, 2, S / 2, ...]: a rank's part is contiguous.
    sent = torch.stack(by_rank)
    kept = reduce_scatter_to_sequence_parallel_region(sent, group=group)
    return torch.cat(tuple(kept), dim=1)


def _add(total_2UKD: Tensor, parts: list[Tensor]) -> None:
    for total, part in zip(total_2UKD, parts, strict=True):
        total += part
