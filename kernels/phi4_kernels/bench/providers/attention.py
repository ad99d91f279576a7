"""Attention over packed documents by libraries that take one document, or boundaries only."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from phi4_kernels.errors import KernelError


@dataclass(frozen=True, slots=True)
class _PackedDocuments:
    """Packed documents, and the options of attention within each."""

    offsets: Tensor
    """[num_documents + 1], int32: where they begin and the last one ends."""
    lengths: tuple[int, ...]
    longest: int
    causal: bool
    scale: float


_Attend = Callable[[Tensor, Tensor, Tensor, _PackedDocuments], Tensor]
"""q [T, N, D], k and v [T, G, D] -> [T, N, D]."""


def torch_flash() -> Callable[..., Tensor]:
    """PyTorch's FlashAttention. Ours in torch reads the boundaries, which no graph can capture."""
    from torch.nn.attention import SDPBackend

    return _by_document(SDPBackend.FLASH_ATTENTION)


def torch_cudnn() -> Callable[..., Tensor]:
    """cuDNN's through PyTorch."""
    from torch.nn.attention import SDPBackend

    return _by_document(SDPBackend.CUDNN_ATTENTION)


def flash_attn_2(*, deterministic: bool = False) -> Callable[..., Tensor]:
    """FlashAttention-2; its backward adds by atomics, or deterministically in one order."""
    from flash_attn import flash_attn_varlen_func

    return _by_boundaries(flash_attn_varlen_func, deterministic)


def flash_attn_3(*, deterministic: bool = False) -> Callable[..., Tensor]:
    """FlashAttention-3, as flash_attn_2."""
    from flash_attn_interface import flash_attn_varlen_func

    return _by_boundaries(flash_attn_varlen_func, deterministic)


def _by_document(backend: Any) -> Callable[..., Tensor]:
    """scaled_dot_product_attention by one backend, one call per document."""
    from torch.nn.attention import sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    def attend(q: Tensor, k: Tensor, v: Tensor, documents: _PackedDocuments) -> Tensor:
        parts = (x.transpose(0, 1).split(documents.lengths, dim=1) for x in (q, k, v))
        # One call per document: it takes no boundaries, and a mask would cost the square of the
        # sum.
        run = partial(
            scaled_dot_product_attention,
            is_causal=documents.causal,
            scale=documents.scale,
            enable_gqa=True,
        )
        with sdpa_kernel(backend):
            out = [
                run(*(x.unsqueeze(0) for x in document))[0] for document in zip(*parts, strict=True)
            ]
        return torch.cat(out, dim=1).transpose(0, 1)

    return _as_entry(attend)


def _by_boundaries(function: Callable[..., Any], deterministic: bool) -> Callable[..., Tensor]:
    """FlashAttention's function over boundaries."""

    def attend(q: Tensor, k: Tensor, v: Tensor, documents: _PackedDocuments) -> Tensor:
        result = function(
            q,
            k,
            v,
            cu_seqlens_q=documents.offsets,
            cu_seqlens_k=documents.offsets,
            max_seqlen_q=documents.longest,
            max_seqlen_k=documents.longest,
            softmax_scale=documents.scale,
            causal=documents.causal,
            deterministic=deterministic,
        )
        return result[0] if isinstance(result, tuple) else result

    return _as_entry(attend)


def _as_entry(attend: _Attend) -> Callable[..., Tensor]:
    """Wrap a library's function to take the arguments of the entry `attention`.

    Of packed documents, `starts` and `ends` of the keys follow from `offsets`.
    """

    def run(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        offsets: Tensor,
        starts: Tensor,
        ends: Tensor,
        longest: int,
        lengths: tuple[int, ...] | None,
        causal: bool,
        scale: float,
        kept: Tensor | None = None,
    ) -> Tensor:
        if lengths is None:
            raise KernelError(
                "attention: queries and keys of different tokens; expected packed documents; ask "
                "this provider for another case"
            )
        out = attend(q, k, v, _PackedDocuments(offsets, lengths, longest, causal, scale))
        return out if kept is None else out[kept]

    return run
