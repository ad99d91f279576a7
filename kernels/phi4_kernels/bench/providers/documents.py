"""Attention by functions that know one document, or only boundaries, with an entry's arguments."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from phi4_kernels.errors import KernelError


def _packed(lengths: tuple[int, ...] | None) -> tuple[int, ...]:
    if lengths is None:
        raise KernelError(
            "attention: queries and keys of different tokens; expected packed documents; ask this "
            "provider for another case"
        )
    return lengths


def sdpa(backend: Any) -> Callable[..., Tensor]:
    """scaled_dot_product_attention by one backend, one call per document."""
    from torch.nn.attention import sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    def run(
        q: Tensor, k: Tensor, v: Tensor, *, lengths: Any, causal: bool, scale: float, **others: Any
    ) -> Tensor:
        parts = (x.transpose(0, 1).split(_packed(lengths), dim=1) for x in (q, k, v))
        documents = zip(*parts, strict=True)
        with sdpa_kernel(backend):
            out = [
                scaled_dot_product_attention(
                    *(x.unsqueeze(0) for x in document),
                    is_causal=causal,
                    scale=scale,
                    enable_gqa=True,
                )[0]
                for document in documents
            ]
        return _kept(torch.cat(out, dim=1).transpose(0, 1), **others)

    return run


def varlen(function: Callable[..., Any], *, deterministic: bool) -> Callable[..., Tensor]:
    """FlashAttention's function over boundaries."""

    def run(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        offsets: Tensor,
        longest: int,
        lengths: Any,
        causal: bool,
        scale: float,
        **others: Any,
    ) -> Tensor:
        _packed(lengths)
        where = {"cu_seqlens_q": offsets, "cu_seqlens_k": offsets}
        longest_of = {"max_seqlen_q": longest, "max_seqlen_k": longest}
        options = {"softmax_scale": scale, "causal": causal, "deterministic": deterministic}
        result = function(q, k, v, **where, **longest_of, **options)
        return _kept(result[0] if isinstance(result, tuple) else result, **others)

    return run


def _kept(out: Tensor, *, kept: Tensor | None = None, **_: Any) -> Tensor:
    return out if kept is None else out[kept]
