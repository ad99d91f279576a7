"""The name map and the QKV reorder, against definitions written out row by row."""

from math import prod

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import Phi3ForCausalLM

from phi4.config import ModelConfig
from phi4.errors import CheckpointError
from phi4.model import names
from phi4.model.shape import num_parameters
from tests.support.hugging_face import phi3_config


@st.composite
def models(draw):
    kv_heads, per_group = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    head_dim = 2 * draw(st.integers(1, 3))
    return ModelConfig(
        num_layers=draw(st.integers(1, 12)),
        hidden_size=kv_heads * per_group * head_dim,
        num_attention_heads=kv_heads * per_group,
        num_key_value_heads=kv_heads,
        intermediate_size=draw(st.integers(1, 9)),
        vocab_size=draw(st.integers(2, 9)),
    )


def _rows(model, order):
    """Rows of a QKV matrix that names each row (section, head, dim), in the given head order."""
    return [(section, head, d) for section, head in order for d in range(model.head_dim)]


def _orders(model):
    groups, heads = model.num_key_value_heads, model.num_attention_heads
    blocked = [("q", h) for h in range(heads)]
    blocked += [("k", g) for g in range(groups)] + [("v", g) for g in range(groups)]
    grouped = []
    for g in range(groups):
        grouped += [("q", h) for h in range(heads) if h // (heads // groups) == g]
        grouped += [("k", g), ("v", g)]
    return _rows(model, blocked), _rows(model, grouped)


@given(models())
def test_qkv_rows_go_where_their_head_belongs(model):
    blocked, grouped = _orders(model)
    number = {row: i for i, row in enumerate(blocked)}
    blocked_RH = torch.arange(len(blocked))[:, None].expand(-1, model.hidden_size)
    grouped_RH = torch.tensor([number[row] for row in grouped])[:, None].expand_as(blocked_RH)

    assert torch.equal(names.group_qkv(blocked_RH, model), grouped_RH)
    assert torch.equal(names.block_qkv(grouped_RH, model), blocked_RH)


@given(models())
def test_names_and_shapes_map_one_to_one(model):
    megatron, hf = names.megatron_shapes(model), names.hf_shapes(model)

    assert [names.hf_name(name) for name in megatron] == list(hf)
    assert [names.megatron_name(name) for name in hf] == list(megatron)
    assert list(megatron.values()) == list(hf.values())
    assert sum(prod(s) for s in megatron.values()) == num_parameters(model)
    assert len(hf) == 6 * model.num_layers + 3


def test_hf_shapes_equal_transformers_state_dict():
    model = ModelConfig(
        num_layers=11,
        hidden_size=24,
        num_attention_heads=6,
        num_key_value_heads=2,
        intermediate_size=20,
        vocab_size=32,
    )
    with torch.device("meta"):
        reference = Phi3ForCausalLM(phi3_config(model)).state_dict()

    assert names.hf_shapes(model) == {name: tuple(t.shape) for name, t in reference.items()}


def test_released_checkpoint_has_243_tensors():
    assert len(names.hf_shapes(ModelConfig())) == 243


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.qkv_proj.bias",
        "model.layers.x.mlp.down_proj.weight",
        "model.layers.0.model.layers.0.mlp.down_proj.weight",
        "decoder.layers.0.mlp.linear_fc1.weight",
        "",
    ],
)
def test_foreign_name_is_refused(name):
    with pytest.raises(
        CheckpointError, match=r"is not a Phi-4 tensor; expected one of model\.embed"
    ):
        names.megatron_name(name)


def test_qkv_of_one_tensor_rank_is_refused():
    model = ModelConfig(num_layers=1)
    with pytest.raises(CheckpointError, match=r"\[3840, 8\], expected 7680 rows"):
        names.to_hf(
            "decoder.layers.0.self_attention.linear_qkv.weight", torch.empty(3840, 8), model
        )
