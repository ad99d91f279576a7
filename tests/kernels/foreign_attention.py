"""Pretended libraries of attention on the CPU: they compute by the definition, in fp64.

Each has the signature of the genuine functions, refuses what they refuse, and notes what it was
called with. So the adaptors' layouts, boundaries, scales and gradients are held by the error rule.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from unittest import mock

import torch
from phi4_kernels import dispatch, registry
from phi4_kernels.attention import Ranges, cudnn_impl, flash_impl, reference
from torch import Tensor

# Shape legend: T tokens, N query heads, K key-value heads, D head dim; B rows of S tokens.


@dataclass
class Calls:
    """What the pretended functions were called with."""

    forward: int = 0
    deterministic: list[bool] = field(default_factory=list)
    """Of every backward pass: whether it was asked for a fixed order of sums."""
    shapes: list[tuple[int, ...]] = field(default_factory=list)
    """Of every q."""
    sm_margins: list[int] = field(default_factory=list)
    """Of every call of FlashAttention-3."""

    def forwards(
        self, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float
    ) -> tuple[Tensor, Tensor]:
        """Out [T, N, D] and lse [N, T]."""
        self.forward += 1
        self.shapes.append(tuple(q.shape))
        ranges = _checked(cu_seqlens, q, k, v)
        wide = (x.double() for x in (q, k, v))
        out, lse = reference.attention_forward(*wide, ranges, causal=True, scale=scale)
        return out.to(q.dtype), lse.t().float().contiguous()

    def backwards(
        self, tensors: tuple[Tensor, ...], cu_seqlens: Tensor, scale: float, deterministic: bool
    ) -> list[Tensor]:
        """Gradients of q, k and v."""
        self.deterministic.append(deterministic)
        *tensors, lse = tensors
        ranges = _checked(cu_seqlens, *tensors)
        dout, q, k, v, out = (x.double() for x in tensors)
        # It reads lse by its pointer.
        assert lse.is_contiguous() and lse.shape == (q.shape[1], q.shape[0])
        rest = (out, lse.t().double(), ranges)
        found = reference.attention_backward(dout, q, k, v, *rest, causal=True, scale=scale)
        return [x.to(tensors[1].dtype) for x in found]


def _checked(cu_seqlens: Tensor, *tensors: Tensor) -> Ranges:
    """The boundaries, if a library could read them and the tensors."""
    assert cu_seqlens.dtype == torch.int32 and cu_seqlens.is_contiguous()
    for x in tensors:
        assert x.dtype in (torch.bfloat16, torch.float16) and x.dim() == 3
        assert x.stride(-1) == 1 and x.data_ptr() % 16 == 0
        assert all(stride * x.element_size() % 16 == 0 for stride in x.stride()[:-1])
    longest = int(cu_seqlens.diff().max())
    return Ranges.packed(cu_seqlens, longest, tensors[0].shape[0])


def _flash_attn_2(calls: Calls) -> ModuleType:
    """flash_attn.flash_attn_interface of 2.8."""
    module = ModuleType("flash_attn.flash_attn_interface")

    def forward(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p,
        softmax_scale,
        causal,
        window_size_left=-1,
        window_size_right=-1,
        softcap=0.0,
        alibi_slopes=None,
        return_softmax=False,
        block_table=None,
    ):
        assert causal and not dropout_p and cu_seqlens_k is cu_seqlens_q
        assert min(max_seqlen_q, max_seqlen_k) >= cu_seqlens_q.diff().max()
        out, lse = calls.forwards(q, k, v, cu_seqlens_q, softmax_scale)
        return out, lse, None, None

    def backward(
        dout,
        q,
        k,
        v,
        out,
        softmax_lse,
        dq,
        dk,
        dv,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p,
        softmax_scale,
        causal,
        window_size_left,
        window_size_right,
        softcap,
        alibi_slopes,
        deterministic,
        rng_state=None,
    ):
        assert causal and not dropout_p and cu_seqlens_k is cu_seqlens_q
        tensors = (dout, q, k, v, out, softmax_lse)
        found = calls.backwards(tensors, cu_seqlens_q, softmax_scale, deterministic)
        for target, values in zip((dq, dk, dv), found, strict=True):
            target.copy_(values)

    module._flash_attn_varlen_forward = forward
    module._flash_attn_varlen_backward = backward
    return module


def _flash_attn_3(calls: Calls) -> ModuleType:
    """flash_attn_interface of 3.0."""
    module = ModuleType("flash_attn_interface")

    def forward(
        q,
        k,
        v,
        k_new=None,
        cu_seqlens_q=None,
        cu_seqlens_k=None,
        max_seqlen_q=None,
        max_seqlen_k=None,
        softmax_scale=None,
        causal=False,
        num_splits=0,
        sm_margin=0,
    ):
        calls.sm_margins.append(sm_margin)
        assert causal and num_splits == 1 and cu_seqlens_k is cu_seqlens_q
        return *calls.forwards(q, k, v, cu_seqlens_q, softmax_scale), None, None

    def backward(
        dout,
        q,
        k,
        v,
        out,
        softmax_lse,
        cu_seqlens_q=None,
        cu_seqlens_k=None,
        sequed_q=None,
        sequed_k=None,
        max_seqlen_q=None,
        max_seqlen_k=None,
        dq=None,
        dk=None,
        dv=None,
        softmax_scale=None,
        is_causal=False,
        window_size_left=-1,
        window_size_right=-1,
        softcap=0.0,
        deterministic=False,
        sm_margin=0,
    ):
        calls.sm_margins.append(sm_margin)
        assert is_causal and sequed_q is None and sequed_k is None
        assert min(max_seqlen_q, max_seqlen_k) >= cu_seqlens_q.diff().max()
        tensors = (dout, q, k, v, out, softmax_lse)
        found = calls.backwards(tensors, cu_seqlens_q, softmax_scale, deterministic)
        for target, values in zip((dq, dk, dv), found, strict=True):
            target.copy_(values)

    module._flash_attn_forward, module._flash_attn_backward = forward, backward
    return module


def _aten_flash(calls: Calls) -> SimpleNamespace:
    """PyTorch's two operators over boundaries; their schemas are aten's."""

    def forward(q, k, v, cum_q, cum_k, max_q, max_k, dropout_p, is_causal, debug, *, scale):
        assert is_causal and not dropout_p and not debug and cum_k is cum_q
        return *calls.forwards(q, k, v, cum_q, scale), None, None, None

    def backward(
        dout, q, k, v, out, lse, cum_q, cum_k, max_q, max_k, dropout_p, is_causal, state, unused,
        *, scale,
    ):  # fmt: skip
        assert is_causal and not dropout_p and state.numel() == 2 and not unused.numel()
        asked = torch.are_deterministic_algorithms_enabled()
        return calls.backwards((dout, q, k, v, out, lse), cum_q, scale, asked)

    return SimpleNamespace(_flash_attention_forward=forward, _flash_attention_backward=backward)


def _aten_cudnn(calls: Calls) -> SimpleNamespace:
    """PyTorch's two operators of cuDNN over rows of one length."""

    def boundaries(q: Tensor) -> Tensor:
        rows, _, length, _ = q.shape
        assert length > 1, "cuDNN takes no row of one token"
        return torch.arange(rows + 1, dtype=torch.int32) * length

    def tokens(x: Tensor) -> Tensor:
        return x.transpose(1, 2).flatten(0, 1)

    def rows(x: Tensor, like: Tensor) -> Tensor:
        return x.unflatten(0, (like.shape[0], -1)).transpose(1, 2)

    def forward(q, k, v, bias, compute_lse, dropout_p, is_causal, debug, *, scale):
        assert bias is None and compute_lse and is_causal and not dropout_p and not debug
        calls.shapes.append(tuple(q.shape))
        out, lse = Calls().forwards(*map(tokens, (q, k, v)), boundaries(q), scale)
        return rows(out, q), rows(lse.t(), q).unsqueeze(-1), None, None, None, None

    def backward(
        dout, q, k, v, out, lse, seed, offset, bias, cum_q, cum_k, max_q, max_k, dropout_p, causal,
        *, scale,
    ):  # fmt: skip
        assert causal and not dropout_p and (max_q, max_k) == (q.shape[2], k.shape[2])
        assert lse.shape == (*q.shape[:3], 1) and lse.is_contiguous()
        tensors = (*map(tokens, (dout, q, k, v, out)), tokens(lse.squeeze(-1)).t().contiguous())
        return [rows(x, q) for x in calls.backwards(tensors, boundaries(q), scale, False)]

    return SimpleNamespace(
        _scaled_dot_product_cudnn_attention=forward,
        _scaled_dot_product_cudnn_attention_backward=backward,
    )


LIBRARIES = {
    "flash_attn_3 3.0.0": "flash",
    "flash_attn 2.8.3": "flash",
    f"torch {torch.__version__}": "flash",
    f"cudnn 91900 torch {torch.__version__}": "cudnn",
}
"""What can be pretended to be installed, and the implementation that calls it."""


@contextmanager
def installed(*names: str, versions: dict[str, str] | None = None) -> Iterator[Calls]:
    """A pretended GPU of capability 9.0 with these libraries, whose tensors are on the CPU.

    Args:
        names: of LIBRARIES.
        versions: of packages, where they are others than the names say.
    """
    calls, given = Calls(), dict(name.split(" ", 1) for name in names)
    flash_attn_2 = _flash_attn_2(calls)
    modules = {
        "flash_attn_interface": _flash_attn_3(calls),
        "flash_attn": SimpleNamespace(flash_attn_interface=flash_attn_2),
        "flash_attn.flash_attn_interface": flash_attn_2,
    }
    packages = {"flash_attn_interface": "flash_attn_3", "flash_attn": "flash_attn"}
    found = given | (versions or {})
    patches = (
        mock.patch.object(flash_impl, "find_spec", lambda name: packages[name] in found or None),
        mock.patch.object(flash_impl, "version", found.__getitem__),
        mock.patch.object(flash_impl, "_aten", _aten_flash(calls)),
        mock.patch.object(cudnn_impl, "_aten", _aten_cudnn(calls)),
        mock.patch.object(torch.cuda, "is_available", lambda: True),
        mock.patch.object(torch.cuda, "get_device_capability", lambda *_: (9, 0)),
        mock.patch.object(torch.cuda, "get_device_name", lambda *_: "H200"),
        mock.patch.object(
            torch.backends.cuda, "is_flash_attention_available", lambda: "torch" in given
        ),
        mock.patch.object(torch.backends.cudnn, "is_available", lambda: "cudnn" in given),
        mock.patch.object(torch.backends.cudnn, "version", lambda: 91900),
    )
    try:
        for patch in patches:
            patch.start()
        # Not by patch.dict, which at the end would forget what else is imported meanwhile.
        sys.modules |= modules
        forget()
        yield calls
    finally:
        for patch in reversed(patches):
            patch.stop()
        for name in modules:
            del sys.modules[name]
        forget()


def forget() -> None:
    """What was found and chosen so far."""
    flash_impl._found.cache_clear()
    dispatch.choose.cache_clear()
    registry.source_digest.cache_clear()


@contextmanager
def named_on_the_cpu() -> Iterator[None]:
    """Let these implementations be named for CPU tensors; all other checks stay."""
    genuine = dispatch._named_reason

    def reason(op: str, name: str, *others: object) -> str:
        return "named; pretended" if name in registry.FOREIGN else genuine(op, name, *others)

    with mock.patch.object(dispatch, "_named_reason", reason):
        yield
