"""FlashAttention by its own packages where they are installed, else by PyTorch's copy of it.

It takes documents side by side by their boundaries, causal, and nothing else. All three forms get
the same tensors and are asked to add in a fixed order in backward, so two runs give equal bits.
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
"""What the kernels take."""
NOT_SERVED = (ANY_RANGES,)
DETERMINISTIC = True
"""Backward is asked for a fixed order of sums; forward has one."""

_OLDEST_FLASH_ATTN = (2, 7)
"""The first whose functions take the two sides of a window one by one, as ours calls them."""
_aten = torch.ops.aten


class _Documents(NamedTuple):
    """Boundaries [documents + 1], int32, the longest document, and the scale of the scores."""

    cu_seqlens: Tensor
    longest: int
    scale: float
    sm_margin: int
    """Multiprocessors to leave to other kernels; a persistent kernel alone needs to know."""


class _Library(NamedTuple):
    """Whose kernels run."""

    name: str
    forward: Callable[[Tensor, Tensor, Tensor, _Documents], tuple[Tensor, Tensor]]
    """q [T, N, D], k and v [T, K, D] to out [T, N, D] and lse [N, T], fp32."""
    backward: Callable[[Sequence[Tensor], _Documents], tuple[Tensor, Tensor, Tensor]]
    """dout, q, k, v, out and lse [N, T] to dq, dk and dv."""


def library() -> str:
    """Whose kernels run on this machine, with the version; empty where there are none."""
    found, _ = _found()
    return found.name if found else ""


def missing() -> str | None:
    """Why there are none; None where there are."""
    found, absent = _found()
    return None if found else "; ".join(absent)


@cache
def _found() -> tuple[_Library | None, tuple[str, ...]]:
    """The first library that is here, and why those before it are not."""
    if not torch.cuda.is_available():
        return None, ("torch finds no CUDA device",)
    # The newest first: FlashAttention-3 needs Hopper, the others do not.
    absent: list[str] = []
    for load in (_flash_attn_3, _flash_attn_2, _torch_varlen):
        try:
            return load(), tuple(absent)
        except (ImportError, OSError, ValueError) as error:
            absent.append(str(error))
    return None, tuple(absent)


def _flash_attn_3() -> _Library:
    """FlashAttention-3, for Hopper alone."""
    if torch.cuda.get_device_capability()[0] != 9:
        raise ImportError("FlashAttention-3 needs a GPU of capability 9.0")
    if find_spec("flash_attn_interface") is None:
        raise ImportError("flash_attn_interface is not installed")
    from flash_attn_interface import _flash_attn_backward, _flash_attn_forward

    def forward(q: Tensor, k: Tensor, v: Tensor, at: _Documents) -> tuple[Tensor, Tensor]:
        # More than one split would add its parts in an order of its own.
        options = {"softmax_scale": at.scale, "causal": True, "num_splits": 1}
        options["sm_margin"] = at.sm_margin
        out, lse, *_ = _flash_attn_forward(q, k, v, **_boundaries(at), **options)
        return out, lse

    def backward(tensors: Sequence[Tensor], at: _Documents) -> tuple[Tensor, Tensor, Tensor]:
        gradients = _gradients(tensors)
        lengths = (at.cu_seqlens, at.cu_seqlens, None, None, at.longest, at.longest)
        # By place: the name of `causal` differs from release to release.
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
    """PyTorch's copy of FlashAttention-2, whose order of sums the whole process chooses."""
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
    """In the order in which all three take them."""
    return {
        "cu_seqlens_q": at.cu_seqlens,
        "cu_seqlens_k": at.cu_seqlens,
        "max_seqlen_q": at.longest,
        "max_seqlen_k": at.longest,
    }


def _gradients(tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Where to write those of q, k and v."""
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
    """One of the library's two functions; a release with other arguments is an error of ours."""
    found, _ = _found()
    assert found is not None  # or dispatch had refused
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
    """See op.attention_forward; the ranges are documents, as NOT_SERVED says."""
    if not q.shape[0]:
        return torch.empty_like(q), q.new_empty(q.shape[:2], dtype=torch.float32)
    at = _Documents(q_offsets, max(max_queries, max_keys), scale, sm_margin)
    out, lse = _called("forward", *map(aligned, (q, k, v)), at)
    # Theirs is [N, T], ours [T, N]: rows of a query together, as all implementations here have it.
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
