"""FlashAttention from its own packages where they are installed, else PyTorch's copy of it.

Only adjacent causal documents, given by their boundaries, are supported. All three libraries get
the same tensors and are set to sum in a fixed order in backward, so two runs give equal bits.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor

from phi4_kernels.attention.arguments import ANY_RANGES, aligned
from phi4_kernels.errors import ImplementationError

# Shape legend: T tokens, N query heads, K key-value heads, D head dim.

DTYPES = (torch.bfloat16, torch.float16)
"""Dtypes that the kernels support."""
NOT_SERVED = (ANY_RANGES,)
DETERMINISTIC = True
"""Backward is set to a fixed order of sums; forward always has one."""

_OLDEST_FLASH_ATTN = (2, 7)
"""Oldest release whose functions take the two sides of a window as separate arguments."""
_aten = torch.ops.aten


class _Documents(NamedTuple):
    """Boundaries [documents + 1], int32, the longest document, and the scale of the scores."""

    cu_seqlens: Tensor
    longest: int
    scale: float
    sm_margin: int
    """Multiprocessors to leave to other kernels; used by persistent kernels only."""


class _Library(NamedTuple):
    """Name and version of the library."""

    name: str
    forward: Callable[[Tensor, Tensor, Tensor, _Documents], tuple[Tensor, Tensor]]
    """Maps q [T, N, D], k and v [T, K, D] to out [T, N, D] and lse [N, T], fp32."""
    backward: Callable[[Sequence[Tensor], _Documents], tuple[Tensor, Tensor, Tensor]]
    """Maps dout, q, k, v, out and lse [N, T] to dq, dk and dv."""


def library() -> str:
    """Name and version of the library used on this machine; empty where there is none."""
    found, _ = _found()
    return found.name if found else ""


def missing() -> str | None:
    """Why no library can be used; None if one can."""
    found, absent = _found()
    return None if found else "; ".join(absent)


@cache
def _found() -> tuple[_Library | None, tuple[str, ...]]:
    """The first library that can be used, and why those before it cannot."""
    if not torch.cuda.is_available():
        return None, ("torch finds no CUDA device",)
    # Newest first; only FlashAttention-3 requires Hopper.
    absent: list[str] = []
    for load in (_flash_attn_3, _flash_attn_2, _torch_varlen):
        try:
            return load(), tuple(absent)
        except (ImportError, OSError, ValueError) as error:
            absent.append(str(error))
    return None, tuple(absent)


def _flash_attn_3() -> _Library:
    """FlashAttention-3, for Hopper only."""
    if torch.cuda.get_device_capability()[0] != 9:
        raise ImportError("FlashAttention-3 needs a GPU of capability 9.0")
    if find_spec("flash_attn_interface") is None:
        raise ImportError("flash_attn_interface is not installed")
    from flash_attn_interface import _flash_attn_backward, _flash_attn_forward

    def forward(q: Tensor, k: Tensor, v: Tensor, at: _Documents) -> tuple[Tensor, Tensor]:
        # With more than one split the order in which parts are added is not fixed.
        options = {"softmax_scale": at.scale, "causal": True, "num_splits": 1}
        options["sm_margin"] = at.sm_margin
        out, lse, *_ = _flash_attn_forward(q, k, v, **_boundaries(at), **options)
        return out, lse

    def backward(tensors: Sequence[Tensor], at: _Documents) -> tuple[Tensor, Tensor, Tensor]:
        gradients = _gradients(tensors)
        lengths = (at.cu_seqlens, at.cu_seqlens, None, None, at.longest, at.longest)
        # Positional: the name of `causal` differs between releases.
        arguments = (*tensors, *lengths, *gradients, at.scale, True)
        _flash_attn_backward(*arguments, deterministic=True, sm_margin=at.sm_margin)
        return gradients

    return _Library(f"flash_attn_3 {version('flash_attn_3')}", forward, backward)


def _flash_attn_2() -> _Library:
    """FlashAttention-2."""
    if find_spec("flash_attn") is None:
        raise ImportError("flash_attn is not installed")
    release = version("flash_attn")
    if tuple(int(part) for part in release.split(".")[:2]) < _OLDEST_FLASH_ATTN:
        raise ImportError(f"flash_attn is {release}; expected 2.7 or newer; upgrade it")
    from flash_attn.flash_attn_interface import (
        _flash_attn_varlen_backward,
        _flash_attn_varlen_forward,
    )

    plain: dict[str, Any] = {"dropout_p": 0.0, "causal": True, "softcap": 0.0}
    plain |= {"window_size_left": -1, "window_size_right": -1, "alibi_slopes": None}

    def forward(q: Tensor, k: Tensor, v: Tensor, at: _Documents) -> tuple[Tensor, Tensor]:
        options = plain | {"softmax_scale": at.scale, "return_softmax": False}
        out, lse, *_ = _flash_attn_varlen_forward(q, k, v, **_boundaries(at), **options)
        return out, lse

    def backward(tensors: Sequence[Tensor], at: _Documents) -> tuple[Tensor, Tensor, Tensor]:
        gradients = _gradients(tensors)
        options = plain | {"softmax_scale": at.scale, "deterministic": True}
        _flash_attn_varlen_backward(*tensors, *gradients, **_boundaries(at), **options)
        return gradients

    return _Library(f"flash_attn {release}", forward, backward)


def _torch_varlen() -> _Library:
    """PyTorch's copy of FlashAttention-2; its order of sums is a process-wide setting."""
    if not torch.backends.cuda.is_flash_attention_available():
        raise ImportError(f"torch {torch.__version__} is built without flash attention")

    def forward(q: Tensor, k: Tensor, v: Tensor, at: _Documents) -> tuple[Tensor, Tensor]:
        rest = (*_boundaries(at).values(), 0.0, True, False)
        out, lse, *_ = _aten._flash_attention_forward(q, k, v, *rest, scale=at.scale)
        return out, lse

    def backward(tensors: Sequence[Tensor], at: _Documents) -> tuple[Tensor, Tensor, Tensor]:
        # Without dropout the random state is not read.
        state = torch.empty(2, dtype=torch.uint64, device=at.cu_seqlens.device)
        rest = (*_boundaries(at).values(), 0.0, True, state, state[:0])
        with _deterministic():
            return _aten._flash_attention_backward(*tensors, *rest, scale=at.scale)

    return _Library(f"torch {torch.__version__}", forward, backward)


def _boundaries(at: _Documents) -> dict[str, Any]:
    """The tensors in the order in which all three libraries take them."""
    return {
        "cu_seqlens_q": at.cu_seqlens,
        "cu_seqlens_k": at.cu_seqlens,
        "max_seqlen_q": at.longest,
        "max_seqlen_k": at.longest,
    }


def _gradients(tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Tensors for the gradients of q, k and v."""
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in tensors[1:4])
    return dq, dk, dv


@contextmanager
def _deterministic() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)


def _called(run: str, *arguments: Any) -> tuple[Tensor, ...]:
    """Call one of the library's functions; ImplementationError if its signature differs."""
    found, _ = _found()
    assert found is not None  # dispatch has checked it
    try:
        return getattr(found, run)(*arguments)
    except TypeError as error:
        raise ImplementationError(
            f"attention: {found.name} takes other arguments than expected ({error}); install "
            "another release, or use 'triton'"
        ) from error


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
    at = _Documents(q_offsets, max(max_queries, max_keys), scale, sm_margin)
    out, lse = _called("forward", *map(aligned, (q, k, v)), at)
    # The libraries return lse as [N, T]; all implementations here return [T, N].
    return out, lse.t().contiguous()


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
    at = _Documents(q_offsets, max(max_queries, max_keys), scale, sm_margin)
    tensors = (*map(aligned, (dout, q, k, v, out)), lse.t().contiguous())
    dq, dk, dv = _called("backward", tensors, at)
    return dq, dk, dv
