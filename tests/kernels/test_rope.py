"""Laws of rotary embedding that hold for any implementation; here for PyTorch's."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from phi4_kernels.rope import QKVLayout, rope_qkv, rope_tables

COS, SIN = rope_tables(64, 16, 1e4)


def packed(tokens: int, layout: QKVLayout) -> torch.Tensor:
    return torch.randn(tokens, layout.width, generator=torch.Generator().manual_seed(tokens))


@given(st.lists(st.integers(0, 9), min_size=1, max_size=6), st.sampled_from(["grouped", "blocked"]))
def test_documents_are_positions_that_restart(lengths: list[int], order: str) -> None:
    layout = QKVLayout(2, 2, 16, order)
    tokens = sum(lengths)
    qkv = packed(tokens, layout)
    boundaries = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    ids = torch.cat([torch.arange(length) for length in lengths])
    by_documents = rope_qkv(qkv.clone(), layout, COS, SIN, cu_seqlens=boundaries)
    by_ids = rope_qkv(qkv.clone(), layout, COS, SIN, position_ids=ids)
    for first, second in zip(by_documents, by_ids, strict=True):
        assert torch.equal(first, second)


@given(st.integers(0, 30), st.integers(0, 30))
def test_scores_depend_on_distance_alone(position: int, shift: int) -> None:
    layout = QKVLayout(1, 1, 16)
    qkv = packed(2, layout).double().float()

    def score(first: int, second: int) -> torch.Tensor:
        ids = torch.tensor([first, second])
        q, k, _ = rope_qkv(qkv.clone(), layout, COS, SIN, position_ids=ids)
        return q[0, 0, 0].double() @ k[1, 0].double()

    torch.testing.assert_close(
        score(position, 0), score(position + shift, shift), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("order", ["grouped", "blocked"])
def test_q_k_v_are_views_and_values_pass_through(order: str) -> None:
    layout = QKVLayout(3, 2, 16, order)
    qkv = packed(5, layout)
    before = [part.clone() for part in layout.split(qkv)]
    parts = rope_qkv(qkv, layout, COS, SIN)
    assert [tuple(part.shape) for part in parts] == [(5, 3, 2, 16), (5, 3, 16), (5, 3, 16)]
    storage = qkv.untyped_storage().data_ptr()
    assert all(part.untyped_storage().data_ptr() == storage for part in parts)
    assert torch.equal(parts[2], before[2]) and not torch.equal(parts[0], before[0])
    assert torch.equal(parts[0][0], before[0][0])


def test_orders_differ_by_where_heads_lie() -> None:
    grouped, blocked = QKVLayout(3, 2, 16), QKVLayout(3, 2, 16, "blocked")
    source, target = packed(4, grouped), torch.empty(4, blocked.width)
    for part, place in zip(grouped.split(source), blocked.split(target), strict=True):
        place.copy_(part)
    for first, second in zip(
        rope_qkv(source, grouped, COS, SIN), rope_qkv(target, blocked, COS, SIN), strict=True
    ):
        assert torch.equal(first, second)


def test_only_the_projection_gets_a_gradient_and_only_tables_are_saved() -> None:
    layout = QKVLayout(2, 2, 16)
    projection = torch.randn(8, layout.width, requires_grad=True)
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        *_, v = rope_qkv(torch.ones(4, 8) @ projection, layout, COS, SIN)
    assert max(tensor.numel() for tensor in saved if tensor.shape != (4, 8)) <= projection.numel()
    assert not any(tensor.shape == (4, layout.width) for tensor in saved)
    # Values alone are used: the gradients of q and k are zeros.
    v.sum().backward()
    dq, dk, dv = layout.split(projection.grad)
    assert not dq.any() and not dk.any() and (dv == 4).all()


def test_whoever_saved_the_projection_is_told() -> None:
    layout = QKVLayout(1, 1, 16)
    qkv = packed(2, layout).requires_grad_() * 1
    square = qkv * qkv
    rope_qkv(qkv, layout, COS, SIN)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        square.sum().backward()


def test_tables_are_right_where_fp32_angles_are_not() -> None:
    cos, _ = rope_tables(16385, 128, 250_000.0)
    exact = torch.cos(torch.tensor(16384.0, dtype=torch.float64))
    assert cos[16384, 0] == exact.float()
