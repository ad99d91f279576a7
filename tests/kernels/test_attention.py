"""Laws of attention over ranges that hold for any implementation; here for PyTorch's."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from phi4_kernels import errors
from phi4_kernels.attention import (
    Ranges,
    attention,
    attention_backward,
    attention_forward,
    reference,
    torch_impl,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.kernels import attention_checks

DIM, SCALE = 16, 0.3


@st.composite
def drawn_ranges(draw: st.DrawFn) -> tuple[Ranges, int, int]:
    """Ranges with gaps, empty sides and tokens outside, and how many queries and keys there are."""
    offsets, starts, ends = [draw(st.integers(0, 3))], [], []
    for _ in range(draw(st.integers(0, 5))):
        offsets.append(offsets[-1] + draw(st.sampled_from((0, 1, 1, 2, 5, 9))))
        starts.append((ends[-1] if ends else 0) + draw(st.integers(0, 2)))
        ends.append(starts[-1] + draw(st.sampled_from((0, 1, 3, 5, 12))))
    queries, keys = (
        offsets[-1] + draw(st.integers(0, 2)),
        (ends or [0])[-1] + draw(st.integers(0, 2)),
    )
    return Ranges.of(offsets, starts, ends), queries, keys


def random_inputs(queries: int, keys: int, heads: tuple[int, int]) -> tuple[Tensor, ...]:
    """q, k, v and a gradient of out."""
    generator = torch.Generator().manual_seed(queries + keys)
    shapes = ((queries, heads[0]), (keys, heads[1]), (keys, heads[1]), (queries, heads[0]))
    return tuple(torch.randn(*shape, DIM, generator=generator) for shape in shapes)


def packed(*lengths: int) -> Ranges:
    """Documents of these lengths."""
    cu_seqlens = torch.tensor((0, *lengths)).cumsum(0).to(torch.int32)
    return Ranges.packed(cu_seqlens, max(lengths, default=0))


class _LayoutsOfLse(TorchDispatchMode):
    """Keeps shapes and density of the lse that PyTorch's flash backward is called with."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[tuple[int, ...], bool]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.name().endswith(("flash_attention_backward", "for_cpu_backward")):
            lse = args[5]
            self.found.append((tuple(lse.shape), lse.is_contiguous()))
        return func(*args, **(kwargs or {}))


def test_the_flash_backward_gets_a_dense_lse() -> None:
    """Its CUDA form ignores the strides of lse, which here is prepared for all devices."""
    lengths = [(12,), (6, 6), (5, 1, 6)]
    for ranges in (packed(*each) for each in lengths):
        *inputs, dout = random_inputs(12, 12, (4, 2))
        out, lse = attention(*inputs, ranges, implementation="torch")
        where = ranges.q_offsets, ranges.k_starts, ranges.k_ends
        # Below the registered operator, inside which a mode sees nothing.
        with _LayoutsOfLse() as layouts:
            torch_impl.backward(dout, *inputs, out, lse, *where, 12, 12, True, DIM**-0.5, 0)
        assert layouts.found and all(dense for _, dense in layouts.found)


@settings(max_examples=60)
@given(drawn_ranges(), st.sampled_from(((4, 4), (4, 1), (6, 2))), st.booleans())
def test_any_ranges_equal_the_definition(
    drawn: tuple[Ranges, int, int], heads: tuple[int, int], causal: bool
) -> None:
    ranges, queries, keys = drawn
    *inputs, dout = random_inputs(queries, keys, heads)
    options = {"causal": causal, "scale": SCALE}
    leaves = [x.requires_grad_() for x in inputs]
    out, lse = attention(*leaves, ranges, **options)
    gradients = torch.autograd.grad(out, leaves, dout)
    exact = [x.detach().double() for x in inputs]
    true_out, true_lse = reference.attention_forward(*exact, ranges, **options)
    truth = reference.attention_backward(
        dout.double(), *exact, true_out, true_lse, ranges, **options
    )
    torch.testing.assert_close(out.double(), true_out, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse.double(), true_lse, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(gradients, truth, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("causal", [True, False])
def test_the_definition_is_masked_softmax_and_its_gradient(causal: bool) -> None:
    ranges = Ranges.of([0, 3, 5, 8], [0, 4, 6], [4, 6, 7])
    *inputs, dout = (x.double().requires_grad_() for x in random_inputs(8, 8, (4, 2)))
    visible = torch.zeros(8, 8, dtype=torch.bool)
    # Three queries after one cached key, a square, and more queries than keys.
    visible[:3, :4] = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]) > 0
    visible[3:5, 4:6] = torch.tensor([[1, 0], [1, 1]]) > 0
    visible[5:8, 6:7] = torch.tensor([[0], [0], [1]]) > 0
    if not causal:
        visible[:3, :4] = visible[3:5, 4:6] = visible[5:8, 6:7] = True

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (x.repeat_interleave(2, dim=1).transpose(0, 1) for x in (k, v))
        scores = (q.transpose(0, 1) @ k.mT * SCALE).masked_fill(~visible, -torch.inf)
        return (scores.softmax(-1).nan_to_num() @ v).transpose(0, 1)

    expected = plain(*inputs)
    got = reference.attention(*inputs, ranges, causal=causal, scale=SCALE)
    torch.testing.assert_close(got, expected)
    for ours, theirs in zip(
        torch.autograd.grad(got, inputs, dout),
        torch.autograd.grad(expected, inputs, dout),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs.nan_to_num())


def test_a_query_without_keys_and_a_key_without_queries() -> None:
    ranges = Ranges.of([1, 4], [2], [4])
    *inputs, dout = random_inputs(5, 6, (2, 1))
    leaves = [x.requires_grad_() for x in inputs]
    out, lse = attention(*leaves, ranges)
    seeing = torch.tensor([False, False, True, True, False])
    assert torch.equal(lse.isfinite(), seeing[:, None].expand(-1, 2))
    assert torch.equal(lse[~seeing], torch.full((3, 2), -torch.inf))
    assert not out[~seeing].any() and out[seeing].all()
    dq, dk, dv = torch.autograd.grad(out, leaves, dout)
    assert not dq[~seeing].any()
    seen = torch.tensor([False, False, True, True, False, False])
    for gradient in (dk, dv):
        assert not gradient[~seen].any() and gradient[seen].any()


def test_parts_of_the_keys_merge_to_the_whole() -> None:
    q, k, v, dout = random_inputs(9, 9, (4, 2))
    whole = packed(4, 5)
    # Query ranges by what a context rank sees of its own keys, and of the keys before.
    near, far = Ranges.of([2, 4, 9], [2, 4], [4, 9]), Ranges.of([2, 4], [0], [2])
    out, lse = attention_forward(q, k, v, whole, scale=SCALE)
    gradients = attention_backward(dout, q, k, v, out, lse, whole, scale=SCALE)
    parts = [
        attention_forward(q, k, v, near, scale=SCALE),
        attention_forward(q, k, v, far, causal=False, scale=SCALE),
    ]
    total = torch.logaddexp(parts[0].lse, parts[1].lse)
    merged = sum(part.out * (part.lse - total).exp().unsqueeze(-1) for part in parts)
    torch.testing.assert_close(merged[2:], out[2:])
    torch.testing.assert_close(total[2:], lse[2:])
    by_part = [
        attention_backward(dout, q, k, v, out, lse, near, scale=SCALE),
        attention_backward(dout, q, k, v, out, lse, far, causal=False, scale=SCALE),
    ]
    torch.testing.assert_close((by_part[0][0] + by_part[1][0])[2:], gradients[0][2:])
    for index in (1, 2):
        torch.testing.assert_close(by_part[0][index][4:], gradients[index][4:])


def test_a_document_never_sees_another() -> None:
    """Bits, not tolerances: what lies in the other documents changes nothing here."""
    q, k, v, _ = random_inputs(12, 12, (2, 1))
    before = attention(q, k, v, packed(3, 4, 5))
    for tensor in (q, k, v):
        tensor[3:7] = torch.randn_like(tensor[3:7])
    after = attention(q, k, v, packed(3, 4, 5))
    kept = torch.arange(12).sub(3).ge(4) | torch.arange(12).lt(3)
    for first, second in zip(before, after, strict=True):
        assert torch.equal(first[kept], second[kept])
        assert not torch.equal(first[~kept], second[~kept])


def test_a_document_of_one_token_is_its_value() -> None:
    *inputs, dout = random_inputs(5, 5, (4, 2))
    leaves = [x.requires_grad_() for x in inputs]
    out, lse = attention(*leaves, packed(1, 1, 1, 1, 1), scale=SCALE)
    q, k, v = (x.detach() for x in inputs)
    torch.testing.assert_close(out, v.repeat_interleave(2, dim=1))
    torch.testing.assert_close(lse, (q * k.repeat_interleave(2, dim=1)).sum(-1) * SCALE)
    dq, dk, dv = torch.autograd.grad(out, leaves, dout)
    torch.testing.assert_close(dv, dout.unflatten(1, (2, 2)).sum(2))
    assert max(dq.abs().max(), dk.abs().max()) < 1e-5


def test_what_is_not_finite_stays_in_its_document() -> None:
    attention_checks.what_is_not_finite_stays_in_its_document("torch")


def test_queries_by_group_are_those_in_a_row() -> None:
    q, k, v, dout = random_inputs(6, 6, (4, 2))
    ranges, by_group = packed(2, 4), q.unflatten(1, (2, 2))
    out, lse = attention(q, k, v, ranges)
    assert torch.equal(attention(by_group, k, v, ranges).out, out)
    flat = attention_backward(dout, q, k, v, out, lse, ranges)
    grouped = attention_backward(dout, by_group, k, v, out, lse, ranges)
    assert grouped[0].shape == by_group.shape
    for first, second in zip(flat, grouped, strict=True):
        assert torch.equal(first.flatten(), second.flatten())


def test_strided_views_and_no_tokens() -> None:
    q, k, v, _ = random_inputs(6, 6, (4, 2))
    packed_qkv = torch.cat((q, k, v), dim=1)
    views = packed_qkv.split((4, 2, 2), dim=1)
    assert torch.equal(attention(*views, packed(2, 4)).out, attention(q, k, v, packed(2, 4)).out)
    nothing = [x[:0].clone().requires_grad_() for x in (q, k, v)]
    out, lse = attention(*nothing, packed())
    assert out.shape == (0, 4, DIM) and lse.shape == (0, 4)
    assert [x.shape[0] for x in torch.autograd.grad(out.sum(), nothing)] == [0, 0, 0]


def test_lse_is_a_constant() -> None:
    q, k, v, _ = random_inputs(3, 3, (1, 1))
    out, lse = attention(q.requires_grad_(), k, v, packed(3))
    assert out.requires_grad and not lse.requires_grad


Q, K, V, DOUT = random_inputs(4, 4, (4, 2))
RANGES = packed(4)
BAD = {
    "descending boundaries": (
        lambda: attention(Q, K, V, Ranges.packed(torch.tensor([0, 3, 2], dtype=torch.int32), 3)),
        errors.PositionError,
        "q_offsets run 3, 2 at index 2",
    ),
    "descending host boundaries": (
        lambda: Ranges.of([0, 2, 1], [0, 2], [2, 4]),
        errors.PositionError,
        "ascending",
    ),
    "overlapping keys": (
        lambda: Ranges.of([0, 2, 4], [0, 1], [2, 4]),
        errors.PositionError,
        "key ranges run 2, 1",
    ),
    "a boundary below zero": (lambda: Ranges.of([-1, 2], [0], [2]), errors.PositionError, "-1"),
    "more queries than there are": (
        lambda: attention(Q, K, V, packed(5)),
        errors.PositionError,
        "to 4",
    ),
    "more keys than there are": (
        lambda: attention(Q, K, V, Ranges.of([0, 4], [0], [5])),
        errors.PositionError,
        "key ranges span 0 to 5",
    ),
    "a start too few": (lambda: Ranges.of([0, 2, 4], [0], [2]), errors.ShapeError, r"\(1,\)"),
    "boundaries in int64": (
        lambda: Ranges.packed(torch.tensor([0, 4]), 4),
        errors.DtypeError,
        "int64",
    ),
    "groups that are not the keys'": (
        lambda: attention(Q.unflatten(1, (1, 4)), K, V, RANGES),
        errors.ShapeError,
        "its groups are k's heads",
    ),
    "heads that do not divide": (
        lambda: attention(Q[:, :3], K, V, RANGES),
        errors.ShapeError,
        "3 query heads over 2 key heads",
    ),
    "no heads": (
        lambda: attention(Q, K[:, :0], V[:, :0], RANGES),
        errors.ShapeError,
        "0 key heads",
    ),
    "another head_dim": (
        lambda: attention(Q, K[..., :8], V[..., :8], RANGES),
        errors.ShapeError,
        "8",
    ),
    "values of another shape": (
        lambda: attention(Q, K, V[:3], RANGES),
        errors.ShapeError,
        r"\(3, 2",
    ),
    "rows and tokens apart": (
        lambda: attention(Q[None], K[None], V[None], RANGES),
        errors.ShapeError,
        "flatten rows",
    ),
    "a gap between elements": (
        lambda: attention(Q.mT.contiguous().mT, K, V, RANGES),
        errors.ShapeError,
        "strides",
    ),
    "two dtypes": (lambda: attention(Q, K.half(), V, RANGES), errors.DtypeError, "float16"),
    "doubles": (
        lambda: attention(Q.double(), K.double(), V.double(), RANGES),
        errors.DtypeError,
        "float64",
    ),
    "two devices": (lambda: attention(Q, K, V.to("meta"), RANGES), errors.DeviceError, "meta"),
    "a negative scale": (
        lambda: attention(Q, K, V, RANGES, scale=-1.0),
        errors.KernelError,
        "positive",
    ),
    "a margin below 0": (
        lambda: attention(Q, K, V, RANGES, sm_margin=-1),
        errors.KernelError,
        "sm_margin is -1",
    ),
    "a scale that is no number": (
        lambda: attention(Q, K, V, RANGES, scale=math.nan),
        errors.KernelError,
        "nan",
    ),
    "dout of another shape": (
        lambda: attention_backward(DOUT[:2], Q, K, V, Q, Q[..., 0], RANGES),
        errors.ShapeError,
        "dout",
    ),
    "lse of another dtype": (
        lambda: attention_backward(DOUT, Q, K, V, Q, Q[..., 0].half(), RANGES),
        errors.DtypeError,
        "lse",
    ),
    "a kernel without a GPU": (
        lambda: attention(Q, K, V, RANGES, implementation="triton"),
        errors.KernelError,
        "triton",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_a_typed_error_with_a_remedy(case: str) -> None:
    call, error, text = BAD[case]
    with pytest.raises(error, match=text) as raised:
        call()
    assert "\n" not in str(raised.value) and str(raised.value).count(";") >= 1
