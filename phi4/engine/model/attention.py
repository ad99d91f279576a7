"""Self attention: fused QKV, RoPE per document, and core attention within documents.

`CoreAttention` passes one range per document to the op, so the cost is proportional to the sum of
squared document lengths; rows split over context ranks go through `context_attention`.
"""

import torch
import torch.nn.functional as F
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.enums import AttnMaskType
from phi4_kernels.attention import attention
from phi4_kernels.rope import QKVLayout, rope_qkv

from phi4.engine.model.context_attention import AllGatherAttention, RingAttention
from phi4.engine.model.hook_arguments import refuse
from phi4.engine.model.micro_batch import Documents

# Shape legend: S local sequence, B rows, T = B * S tokens, N query heads and K key-value heads per
# tensor rank, G = N / K, D head dim.

_SELF_ATTENTION = dict.fromkeys(
    (
        "attention_mask",
        "key_value_states",
        "inference_context",
        "rotary_pos_emb",
        "rotary_pos_cos",
        "rotary_pos_sin",
        "rotary_pos_cos_sin",
        "attention_bias",
        "sequence_len_offset",
        "inference_params",
    )
)
"""Arguments of megatron-core's call that must be None; see `refuse`."""

_CORE_ATTENTION = {
    "attention_mask": None,
    "attention_bias": None,
    "attn_mask_type": AttnMaskType.causal,
}
_CORE_ATTENTION_INIT = {
    "attn_mask_type": AttnMaskType.causal,
    "attention_type": "self",
    "cp_comm_type": None,
}


class Phi4SelfAttention(SelfAttention):
    """megatron-core's SelfAttention with rotation on the packed, grouped QKV.

    In the grouped layout [K, G queries | key | value] the queries and the key of a group are
    adjacent, so one rotation covers both. A kernel rotates them in place, and core attention gets
    views: queries stay [K, G, D], because heads of several groups have no common stride.
    """

    implementation = "torch"
    """Implementation of RoPE; set by the spec."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        *,
        packed_seq_params: Documents,
        **others: object,
    ) -> tuple[torch.Tensor, None]:
        """[S, B, hidden] (S / tp under sequence parallelism) to the same shape, and no bias.

        Raises:
            ConfigError: another argument of megatron-core's is set; see `refuse`.

        Collectives: as the two parallel linears (gather in, reduce out over tp) and CoreAttention.
        """
        refuse("self attention", others, _SELF_ATTENTION)
        qkv, _ = self.linear_qkv(hidden_states)
        q, k_SBKD, v_SBKD = self.rotate_and_split(qkv, packed_seq_params)
        attend = (
            self._checkpointed_attention_forward
            if self.checkpoint_core_attention and self.training
            else self.core_attention
        )
        context = attend(
            q,
            k_SBKD,
            v_SBKD,
            None,
            attn_mask_type=self.attn_mask_type,
            packed_seq_params=packed_seq_params,
        )
        output, _ = self.linear_proj(context)
        return output, None

    def rotate_and_split(
        self, qkv: torch.Tensor, documents: Documents
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return q [S, B, N, D], or [S, B, K, G, D] from a kernel, and k and v [S, B, K, D].

        A kernel overwrites qkv [S, B, K * (G + 2) * D], and the results are views of it. Nothing
        else reads qkv: the linear saves its input, and recompute computes qkv again.
        """
        num_groups = self.num_query_groups_per_partition
        head_dim = self.hidden_size_per_attention_head
        if self.implementation == "torch":
            assert documents.cos_SBD is not None and documents.sin_SBD is not None
            qkv_SBKGD = qkv.view(*qkv.shape[:2], num_groups, -1, head_dim)
            return rotate_and_split(qkv_SBKGD, documents.cos_SBD, documents.sin_SBD)
        assert documents.rope_cache is not None
        num_heads = self.num_attention_heads_per_partition
        q_TKGD, k_TKD, v_TKD = rope_qkv(
            qkv.flatten(0, 1),
            QKVLayout(num_groups, num_heads // num_groups, head_dim),
            documents.rope_cache.cos_PD2,
            documents.rope_cache.sin_PD2,
            position_ids=documents.positions_T,
            implementation=self.implementation,
        )
        rows = qkv.shape[:2]
        return tuple(x.unflatten(0, rows) for x in (q_TKGD, k_TKD, v_TKD))


def rotate_and_split(
    qkv_SBKGD: torch.Tensor, cos_SBD: torch.Tensor, sin_SBD: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Apply RoPE to queries and keys of grouped QKV [S, B, K, G + 2, D]; return q [S, B, N, D], k,
    v.

    Source: RoFormer, equation 34, with halves instead of interleaved pairs.
    """
    cos, sin = cos_SBD[:, :, None, None], sin_SBD[:, :, None, None]
    qk = qkv_SBKGD[..., :-1, :]
    first, second = qk.chunk(2, dim=-1)
    rotated = qk * cos + torch.cat((-second, first), dim=-1) * sin
    q_SBND = rotated[..., :-1, :].flatten(2, 3)
    return q_SBND, rotated[..., -1, :], qkv_SBKGD[..., -1, :]


class CoreAttention(torch.nn.Module):
    """Causal softmax attention that never crosses document boundaries.

    Signature of megatron-core's core_attention hook.
    """

    implementation = "torch"
    """Implementation of attention; set by the spec."""

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
        given = {
            "attn_mask_type": attn_mask_type,
            "attention_type": attention_type,
            "cp_comm_type": cp_comm_type,
        }
        refuse("core attention", given, _CORE_ATTENTION_INIT)
        self.layer_number = layer_number
        self.context_group = pg_collection.cp
        self.scale = softmax_scale or config.kv_channels**-0.5

    def forward(
        self,
        q: torch.Tensor,
        k_SBKD: torch.Tensor,
        v_SBKD: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        packed_seq_params: Documents,
        **others: object,
    ) -> torch.Tensor:
        """Attend within documents; return [S, B, N * D].

        q is [S, B, N, D], or [S, B, K, G, D], which avoids a copy.

        Raises:
            ConfigError: a mask, a bias or a mask type other than causal; see `refuse`.

        Collectives: none without context parallelism, else those of `AllGatherAttention` or
        `RingAttention`.
        """
        refuse("core attention", {"attention_mask": attention_mask, **others}, _CORE_ATTENTION)
        documents, options = packed_seq_params, {"scale": self.scale}
        is_on_host = q.device.type == "cpu"
        if documents.one_per_row and self.implementation == "torch" and is_on_host:
            # Rows that are a batch need no copy into one sequence. On a GPU the copy's backward
            # would add in nondeterministic order; the op's does not.
            q_SBND = q.reshape(*q.shape[:2], -1, q.shape[-1])
            q, k, v = (t.permute(1, 2, 0, 3) for t in (q_SBND, k_SBKD, v_SBKD))
            out = F.scaled_dot_product_attention(
                q, k, v, is_causal=True, enable_gqa=True, **options
            )
            return out.permute(2, 0, 1, 3).flatten(2, 3)
        options["implementation"] = self.implementation
        if self.context_group.size() > 1:
            route = RingAttention if len(documents.visible) > 1 else AllGatherAttention
            out_SBND = route.apply(
                q, k_SBKD, v_SBKD, documents.visible, self.context_group, options
            )
            return out_SBND.flatten(2, 3)
        num_rows = q.shape[1]
        q, k, v = (t.transpose(0, 1).flatten(0, 1) for t in (q, k_SBKD, v_SBKD))
        ((ranges,),) = documents.visible
        assert ranges is not None, "a rank sees the documents it holds"
        out_TND = attention(q, k, v, ranges, **options).out
        return out_TND.unflatten(0, (num_rows, -1)).transpose(0, 1).flatten(2, 3)
