"""cuDNN's attention through PyTorch: adjacent causal documents, those of one length at a time.

PyTorch calls cuDNN by rows of one length, so adjacent documents of one length are one call, and the
boundaries are read on the host: on a GPU that waits for the device. The order of the sums in its
backward is not fixed.
"""

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from phi4_kernels.attention.arguments import ANY_RANGES, aligned
from phi4_kernels.attention.once import once

# Shape legend: T tokens, N query heads, K key-value heads, D head dim; B documents of one length S.

DTYPES = (torch.bfloat16, torch.float16)
"""Dtypes that the kernels support."""
NOT_SERVED = (ANY_RANGES,)
DETERMINISTIC = False
"""PyTorch does not request the deterministic form of cuDNN's backward."""

_aten = torch.ops.aten
_OLDEST = 90_000
"""Oldest version of cuDNN that supports rows of any length."""


def library() -> str:
    """Versions of cuDNN and of the PyTorch that calls it; empty where cuDNN is missing."""
    return "" if missing() else f"cudnn {_version()} torch {torch.__version__}"


def missing() -> str | None:
    """Why cuDNN's attention cannot run on this machine; None if it can."""
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    if not torch.backends.cudnn.is_available():
        return f"torch {torch.__version__} finds no cuDNN"
    if _version() < _OLDEST:
        return f"cuDNN is {_version()}; expected {_OLDEST} or newer; upgrade it"
    return None


def _version() -> int:
    return torch.backends.cudnn.version() or 0


class _Rows(NamedTuple):
    """Adjacent documents of one length."""

    start: int
    num_documents: int
    length: int

    def of(self, x: Tensor) -> Tensor:
        """View of these tokens of [T, heads, ...] as [B, heads, S, ...]."""
        part = x[self.start : self.start + self.num_documents * self.length]
        return part.unflatten(0, (self.num_documents, self.length)).transpose(1, 2)


def _tokens(rows: Tensor) -> Tensor:
    """Inverse of _Rows.of."""
    return rows.transpose(1, 2).flatten(0, 1)


def _rows(q_offsets: Tensor) -> list[_Rows]:
    """The documents that have tokens, in order, grouped by length."""
    lengths = q_offsets.diff().tolist()
    found, start = [], 0
    # Empty documents have no tokens, so those before and after them are neighbours.
    for length, same in groupby(length for length in lengths if length):
        found.append(_Rows(start, len(list(same)), length))
        start += found[-1].num_documents * length
    return found


def _parts(where: tuple[Tensor, Tensor, Tensor], *tensors: Tensor) -> Iterator[list[Tensor]]:
    """Yield views [B, heads, S, ...] of the tensors, one per group of documents of one length."""
    for rows in once(where, ("cudnn",), lambda: _rows(where[0])):
        yield [rows.of(x) for x in tensors]


def _joined(parts: Sequence[Tensor]) -> Tensor:
    tokens = [_tokens(part) for part in parts]
    return tokens[0].contiguous() if len(tokens) == 1 else torch.cat(tokens)


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """out [B, N, S, D] and lse [B, N, S] of q [B, N, S, D], k and v [B, K, S, D]."""
    if q.shape[2] == 1:
        # cuDNN does not support a single token; its result is its own value.
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        return v, (q.float() * k.float()).sum(-1) * scale
    run = _aten._scaled_dot_product_cudnn_attention
    out, lse, *_ = run(q, k, v, None, True, 0.0, True, False, scale=scale)
    return out, lse.reshape(q.shape[:3])


def _attend_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, given out and lse."""
    length = q.shape[2]
    if length == 1:
        return _single_backward(dout, q, k, v, out, lse, scale)
    # Without dropout the random state is not read.
    state = torch.zeros((), dtype=torch.int64, device=q.device)
    rest = (state, state, None, None, None, length, length, 0.0, True)
    run = _aten._scaled_dot_product_cudnn_attention_backward
    return run(dout, q, k, v, out, lse.contiguous().unsqueeze(-1), *rest, scale=scale)


def _single_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of single tokens; lse may cover more keys, so the weight may be less than 1."""
    groups, dtype = (k.shape[1], -1), q.dtype
    dout, q, out = (x.float().unflatten(1, groups) for x in (dout, q, out))
    k, v = (x.float().unsqueeze(2) for x in (k, v))
    # p = exp(s - lse), ds = p * (dp - delta), as in the definition; a single key makes each sum one
    # term
    weights = ((q * k).sum(-1) * scale - lse.unflatten(1, groups)).exp().unsqueeze(-1)
    dscores = weights * ((dout * v).sum(-1, keepdim=True) - (dout * out).sum(-1, keepdim=True))
    dq = (dscores * k * scale).flatten(1, 2)
    dk, dv = (dscores * q * scale).sum(2), (weights * dout).sum(2)
    return dq.to(dtype), dk.to(dtype), dv.to(dtype)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_offsets: Tensor,
    k_starts: Tensor,
    k_ends: Tensor,
    max_queries: int,
    max_keys: int,
    causal: bool,
    scale: float,
    sm_margin: int,
) -> tuple[Tensor, Tensor]:
    """See op.attention_forward; the ranges are documents, see NOT_SERVED."""
    if not q.shape[0]:
        return torch.empty_like(q), q.new_empty(q.shape[:2], dtype=torch.float32)
    where, tensors = (q_offsets, k_starts, k_ends), map(aligned, (q, k, v))
    parts = [_attend(q, k, v, scale) for q, k, v in _parts(where, *tensors)]
    out, lse = map(_joined, zip(*parts, strict=True))
    return out, lse


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    q_offsets: Tensor,
    k_starts: Tensor,
    k_ends: Tensor,
    max_queries: int,
    max_keys: int,
    causal: bool,
    scale: float,
    sm_margin: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """See op.attention_backward."""
    if not q.shape[0]:
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    where, tensors = (q_offsets, k_starts, k_ends), map(aligned, (dout, q, k, v, out))
    parts = [
        _attend_backward(dout, q, k, v, out, lse, scale)
        for dout, q, k, v, out, lse in _parts(where, *tensors, lse)
    ]
    dq, dk, dv = map(_joined, zip(*parts, strict=True))
    return dq, dk, dv
