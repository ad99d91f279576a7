"""Self attention: fused QKV, RoPE per document, core attention that stays within documents.

`CoreAttention` is the torch implementation of the op: exact under TP, SP and CP, cost in the sum of
squared document lengths. Context parallelism gathers K and V over its ranks and leaves Q in place.
"""

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.attention import SelfAttention
from phi4_kernels.rope import QKVLayout, rope_qkv

from phi4.engine.layout import context_chunks
from phi4.engine.placement import Documents, Segment

# Shape legend: S local sequence, B rows, T = B * S tokens, N query heads and K key-value heads per
# tensor rank, G = N / K, D head dim.


class Phi4SelfAttention(SelfAttention):
    """megatron-core's SelfAttention with rotation on the packed, grouped QKV.

    In the grouped layout [K, G queries | key | value] the queries and the key of a group are
    neighbours, so one rotation serves both and nothing is copied to split them first.
    """

    implementation = "torch"
    """Of RoPE; the spec's to set."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        *,
        packed_seq_params: Documents,
        **_: object,
    ) -> tuple[torch.Tensor, None]:
        """[S, B, hidden] (S / tp under sequence parallelism) to the same shape, and no bias.

        Collectives: as the two parallel linears (gather in, reduce out over tp) and CoreAttention.
        """
        qkv, _ = self.linear_qkv(hidden_states)
        q_SBND, k_SBKD, v_SBKD = self._rotate_and_split(qkv, packed_seq_params)
        attend = (
            self._checkpointed_attention_forward
            if self.checkpoint_core_attention and self.training
            else self.core_attention
        )
        context = attend(
            q_SBND,
            k_SBKD,
            v_SBKD,
            attention_mask,
            attn_mask_type=self.attn_mask_type,
            packed_seq_params=packed_seq_params,
        )
        output, _ = self.linear_proj(context)
        return output, None

    def _rotate_and_split(
        self, qkv: torch.Tensor, documents: Documents
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q [S, B, N, D], k and v [S, B, K, D]; a kernel overwrites qkv [S, B, K * (G + 2) * D].

        Nothing else reads qkv: the linear saves its input, and recompute makes qkv anew.
        """
        num_groups = self.num_query_groups_per_partition
        head_dim = self.hidden_size_per_attention_head
        if self.implementation == "torch":
            qkv_SBKGD = qkv.view(*qkv.shape[:2], num_groups, -1, head_dim)
            return rotate_and_split(qkv_SBKGD, documents.cos_SBD, documents.sin_SBD)
        num_heads = self.num_attention_heads_per_partition
        q_TKGD, k_TKD, v_TKD = rope_qkv(
            qkv.flatten(0, 1),
            QKVLayout(num_groups, num_heads // num_groups, head_dim),
            documents.angles.cos_PD2,
            documents.angles.sin_PD2,
            position_ids=documents.positions_T,
            implementation=self.implementation,
        )
        rows = qkv.shape[:2]
        return tuple(x.unflatten(0, rows) for x in (q_TKGD.flatten(1, 2), k_TKD, v_TKD))


def rotate_and_split(
    qkv_SBKGD: torch.Tensor, cos_SBD: torch.Tensor, sin_SBD: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """RoPE on queries and keys of grouped QKV [S, B, K, G + 2, D]; returns q [S, B, N, D], k, v.

    Source: RoFormer, equation 34, with halves instead of interleaved pairs.
    """
    cos, sin = cos_SBD[:, :, None, None], sin_SBD[:, :, None, None]
    qk = qkv_SBKGD[..., :-1, :]
    first, second = qk.chunk(2, dim=-1)
    rotated = qk * cos + torch.cat((-second, first), dim=-1) * sin
    q_SBND = rotated[..., :-1, :].flatten(2, 3)
    return q_SBND, rotated[..., -1, :], qkv_SBKGD[..., -1, :]


class CoreAttention(torch.nn.Module):
    """Causal softmax attention that never crosses a document, in plain torch.

    Signature of megatron-core's core_attention hook.
    """

    def __init__(
        self,
        config,
        layer_number,
        attn_mask_type,
        attention_type,
        cp_comm_type=None,
        softmax_scale=None,
        pg_collection=None,
    ) -> None:
        super().__init__()
        self.context_group = pg_collection.cp
        self.scale = softmax_scale or config.kv_channels**-0.5

    def forward(
        self,
        q_SBND: torch.Tensor,
        k_SBKD: torch.Tensor,
        v_SBKD: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        attn_mask_type=None,
        attention_bias=None,
        packed_seq_params: Documents,
    ) -> torch.Tensor:
        """Attend within documents; [S, B, N * D].

        Collectives: all-gather of K and V over the context group forward, reduce-scatter of their
        gradients backward; 2 * S * B * K * D elements each way per rank.
        """
        num_rows = q_SBND.shape[1]
        if packed_seq_params.one_per_row:
            q, k, v = (t.permute(1, 2, 0, 3) for t in (q_SBND, k_SBKD, v_SBKD))
            out = F.scaled_dot_product_attention(
                q, k, v, is_causal=True, scale=self.scale, enable_gqa=True
            )
            return out.permute(2, 0, 1, 3).flatten(2, 3)
        k_SBKD, v_SBKD = self._whole_rows(k_SBKD), self._whole_rows(v_SBKD)
        # [S, B, heads, D] to [heads, B * S, D]
        q, k, v = (t.permute(2, 1, 0, 3).flatten(1, 2) for t in (q_SBND, k_SBKD, v_SBKD))
        pieces = [self._attend(q, k, v, segment) for segment in packed_seq_params.segments]
        out_NTD = torch.cat(pieces, dim=1)
        return out_NTD.unflatten(1, (num_rows, -1)).permute(2, 1, 0, 3).flatten(2, 3)

    def _attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segment: Segment
    ) -> torch.Tensor:
        queries = q[None, :, segment.q_start : segment.q_end]
        keys = k[None, :, segment.k_start : segment.k_end]
        values = v[None, :, segment.k_start : segment.k_end]
        mask = None if segment.is_aligned else _lower_right(queries.shape[2], keys)
        out = F.scaled_dot_product_attention(
            queries,
            keys,
            values,
            attn_mask=mask,
            is_causal=segment.is_aligned,
            scale=self.scale,
            enable_gqa=True,
        )
        return out[0]

    def _whole_rows(self, x_SBKD: torch.Tensor) -> torch.Tensor:
        """All context ranks' columns in the order of the row, [S_row, B, K, D]."""
        size = self.context_group.size()
        if size == 1:
            return x_SBKD
        gathered = gather_from_sequence_parallel_region(
            x_SBKD, tensor_parallel_output_grad=True, group=self.context_group
        )
        pieces: list[tuple[int, torch.Tensor]] = []
        for rank, piece in enumerate(gathered.chunk(size)):
            chunks = context_chunks(gathered.shape[0], rank, size)
            pieces += zip((start for start, _ in chunks), piece.chunk(2), strict=True)
        return torch.cat([piece for _, piece in sorted(pieces, key=lambda item: item[0])])


def _lower_right(num_queries: int, keys: torch.Tensor) -> torch.Tensor:
    """Causal mask [queries, keys] whose last query sees every key."""
    num_keys = keys.shape[2]
    q = torch.arange(num_keys - num_queries, num_keys, device=keys.device)
    return q[:, None] >= torch.arange(num_keys, device=keys.device)[None, :]
