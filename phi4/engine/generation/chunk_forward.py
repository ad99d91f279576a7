"""A model chunk's forward pass over new tokens, for decoding.

It reads the weights of the training model but does not call megatron-core's modules: without
autograd, sequence parallelism or recompute these are a few products per layer, and for a step of
one token the module calls cost more CPU time than the products. Tests compare it with the training
forward pass and with transformers.
"""

from typing import NamedTuple, Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from phi4_kernels.rms_norm import add_rms_norm, rms_norm
from phi4_kernels.swiglu import swiglu, swiglu_linear

from phi4.engine.layout import Layout
from phi4.engine.model.attention import CoreAttention, Phi4SelfAttention
from phi4.engine.model.gpt import Phi4Model
from phi4.engine.model.layers import AddRMSNorm, Phi4Layer, RMSNorm
from phi4.engine.model.micro_batch import Documents

# Shape legend: T new tokens, H hidden, Q width of queries, keys and values, N query heads and K
# key-value heads per tensor rank, D head dim, R tokens whose logits are wanted, V vocabulary, F
# feed-forward width per tensor rank.


class CachedAttention(Protocol):
    """Attention of new tokens over themselves and the cached ones before them."""

    def attend(
        self, core: CoreAttention, q_TND: torch.Tensor, k_TKD: torch.Tensor, v_TKD: torch.Tensor
    ) -> torch.Tensor:
        """Cache the keys and values of the new tokens of a layer, then attend.

        Args:
            core: core attention of the layer; has its number, the scale and the implementation.
            q_TND: [T, N, D] or by group [T, K, N / K, D], rotated.
            k_TKD: rotated.
            v_TKD: values.

        Returns:
            [T, N, D].
        """
        ...


class _Layer(NamedTuple):
    """The tensors of a layer, looked up once: a lookup through modules costs a microsecond."""

    input_norm: RMSNorm
    attention: Phi4SelfAttention
    core: CoreAttention
    qkv: torch.Tensor
    out: torch.Tensor
    norm: AddRMSNorm
    gate_up: torch.Tensor
    down: torch.Tensor
    swiglu: str

    @classmethod
    def of(cls, layer: Phi4Layer) -> "_Layer":
        attention, mlp = layer.self_attention, layer.mlp
        return cls(
            input_norm=layer.input_layernorm,
            attention=attention,
            core=attention.core_attention,
            qkv=attention.linear_qkv.weight,
            out=attention.linear_proj.weight,
            norm=layer.pre_mlp_layernorm,
            gate_up=mlp.linear_fc1.weight,
            down=mlp.linear_fc2.weight,
            swiglu=mlp.implementation,
        )


class ChunkForward:
    """One chunk of a model, in whatever layout it was built.

    Args:
        chunk: chunk of an engine; its parameters may change in between.
        layout: layout of the engine.
    """

    def __init__(self, chunk: Phi4Model, layout: Layout) -> None:
        self._chunk = chunk
        self._layers = [_Layer.of(layer) for layer in chunk.decoder.layers]
        self._group, self._tp_size = layout.groups.tp, layout.tp_size

    def __call__(
        self,
        tokens_T: torch.Tensor,
        hidden_TH: torch.Tensor | None,
        rotary: Documents,
        cached: CachedAttention,
    ) -> torch.Tensor:
        """Return hidden states [T, H] after this chunk's layers.

        Args:
            tokens_T: ids, int64.
            hidden_TH: output of the previous chunk; None for the first one.
            rotary: RoPE of the tokens.
            cached: the keys and values.

        Collectives: all-reduce over tp of the hidden states, one for the embedding on the first
            chunk and two per layer.
        """
        hidden_TH = self._embedded(tokens_T) if hidden_TH is None else hidden_TH
        for layer in self._layers:
            hidden_TH = self._through(layer, hidden_TH, rotary, cached)
        return hidden_TH

    def logits(self, hidden_RH: torch.Tensor) -> torch.Tensor:
        """Return logits [R, V] of the last chunk.

        Collectives: one all-gather over tp of the logits.
        """
        chunk = self._chunk
        normed_RH = _normed(chunk.decoder.final_layernorm, hidden_RH)
        local_RV = F.linear(normed_RH, chunk.output_layer.weight)
        if self._tp_size == 1:
            return local_RV
        pieces = [torch.empty_like(local_RV) for _ in range(self._tp_size)]
        dist.all_gather(pieces, local_RV, group=self._group)
        return torch.cat(pieces, dim=-1)

    def _embedded(self, tokens_T: torch.Tensor) -> torch.Tensor:
        table = self._chunk.embedding.word_embeddings
        if self._tp_size == 1:
            return F.embedding(tokens_T, table.weight)
        start, end = table.vocab_start_index, table.vocab_end_index
        elsewhere_T = (tokens_T < start) | (tokens_T >= end)
        local_T = (tokens_T - start).masked_fill(elsewhere_T, 0)
        rows_TH = F.embedding(local_T, table.weight).masked_fill(elsewhere_T.unsqueeze(1), 0.0)
        return self._summed(rows_TH)

    def _through(
        self, layer: _Layer, hidden_TH: torch.Tensor, rotary: Documents, cached: CachedAttention
    ) -> torch.Tensor:
        """Return x + attention(norm(x)), then x + mlp(norm(x)): see `Phi4Layer`."""
        normed_TH = _normed(layer.input_norm, hidden_TH)
        qkv_T1Q = F.linear(normed_TH, layer.qkv).unsqueeze(1)
        q, k, v = (x.squeeze(1) for x in layer.attention.rotate_and_split(qkv_T1Q, rotary))
        out_TND = cached.attend(layer.core, q, k, v)
        attended_TH = self._summed(F.linear(out_TND.flatten(1), layer.out))
        norm = layer.norm
        normed_TH, hidden_TH = add_rms_norm(
            attended_TH, hidden_TH, norm.weight, norm.eps, implementation=norm.implementation
        )
        return hidden_TH + self._summed(_mlp(layer, normed_TH))

    def _summed(self, partial: torch.Tensor) -> torch.Tensor:
        if self._tp_size > 1:
            dist.all_reduce(partial, group=self._group)
        return partial


def _normed(norm: RMSNorm, x: torch.Tensor) -> torch.Tensor:
    return rms_norm(x, norm.weight, norm.eps, implementation=norm.implementation)


def _mlp(layer: _Layer, normed_TH: torch.Tensor) -> torch.Tensor:
    gate_up_T2F = F.linear(normed_TH, layer.gate_up)
    if layer.swiglu == "torch":
        return F.linear(swiglu(gate_up_T2F, implementation="torch"), layer.down)
    return swiglu_linear(gate_up_T2F, layer.down, implementation=layer.swiglu)
