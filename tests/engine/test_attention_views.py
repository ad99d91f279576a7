"""Core attention reads the packed QKV that RoPE has rotated in place: nothing is copied on the way.

One row per micro-batch; several are put one after the other, which copies whatever lies between.
"""

from types import SimpleNamespace

import pytest
import torch
from phi4_kernels.rope import QKVLayout

from phi4.engine.model import attention
from phi4.engine.model.attention import CoreAttention, Phi4SelfAttention

LAYOUT = QKVLayout(2, 3, 8)
LENGTH = 5


def split_in_place(qkv: torch.Tensor, layout: QKVLayout, *_, **options: object) -> tuple:
    """RoPE's kernel without the rotation."""
    return layout.split(qkv)


def test_queries_keys_and_values_are_views_of_qkv(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def attend(q, k, v, ranges, **options):
        seen.extend((q, k, v))
        return SimpleNamespace(out=torch.zeros(LENGTH, 6, 8))

    monkeypatch.setattr(attention, "rope_qkv", split_in_place)
    monkeypatch.setattr(attention, "attention", attend)
    layer = SimpleNamespace(
        implementation="triton",
        num_query_groups_per_partition=2,
        num_attention_heads_per_partition=6,
        hidden_size_per_attention_head=8,
    )
    cache = SimpleNamespace(cos_PD2=None, sin_PD2=None)
    documents = SimpleNamespace(
        rope_cache=cache, positions_T=None, one_per_row=False, visible=((object(),),)
    )
    qkv = torch.randn(LENGTH, 1, LAYOUT.width)
    parts = Phi4SelfAttention.rotate_and_split(layer, qkv, documents)
    core = SimpleNamespace(
        implementation="triton", context_group=SimpleNamespace(size=lambda: 1), scale=1.0
    )
    out = CoreAttention.forward(core, *parts, packed_seq_params=documents)
    assert out.shape == (LENGTH, 1, 6 * 8)
    assert [x.shape for x in seen] == [(LENGTH, 2, 3, 8), (LENGTH, 2, 8), (LENGTH, 2, 8)]
    for view in seen:
        assert view.untyped_storage().data_ptr() == qkv.untyped_storage().data_ptr()


@pytest.mark.parametrize(("device", "is_shortcut"), [("cpu", True), ("meta", False)])
def test_torch_attends_by_rows_on_the_host_alone(
    device: str, is_shortcut: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU the backward pass of PyTorch's own function has other bits in every run."""
    asked = []

    def attend(q, k, v, ranges, **options):
        asked.append(options["implementation"])
        return SimpleNamespace(out=torch.zeros_like(q))

    monkeypatch.setattr(attention, "attention", attend)
    core = SimpleNamespace(
        implementation="torch", context_group=SimpleNamespace(size=lambda: 1), scale=1.0
    )
    documents = SimpleNamespace(one_per_row=True, visible=((object(),),))
    q, k, v = (torch.zeros(LENGTH, 2, heads, 8, device=device) for heads in (4, 2, 2))
    out = CoreAttention.forward(core, q, k, v, packed_seq_params=documents)
    assert out.shape == (LENGTH, 2, 4 * 8)
    assert asked == ([] if is_shortcut else ["torch"])
