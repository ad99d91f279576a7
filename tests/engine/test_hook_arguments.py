"""Modules behind megatron-core's hooks refuse what they do not implement."""

import inspect
from types import SimpleNamespace

import pytest
import torch
from megatron.core.transformer.attention import Attention
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_layer import TransformerLayer

from phi4.engine.model import attention, layers
from phi4.engine.model.attention import CoreAttention, Phi4SelfAttention
from phi4.engine.model.layers import Phi4Layer, SwiGLU, SwiGLULinear
from phi4.engine.model.loss_head import LossHead
from phi4.errors import ConfigError

X = torch.zeros(2, 1, 4)
READ = {"self", "hidden_states", "packed_seq_params", "query", "key", "value"}
"""What our modules read, under megatron-core's names."""


def call_layer(**given):
    Phi4Layer.forward(None, X, packed_seq_params=None, **given)


def call_self_attention(**given):
    Phi4SelfAttention.forward(None, X, packed_seq_params=None, **given)


def call_core_attention(**given):
    CoreAttention.forward(None, X, X, X, packed_seq_params=None, **given)


def call_mlp(**given):
    SwiGLU.forward(None, X, **given)


def call_linear(**given):
    SwiGLULinear._forward_impl(None, X, X, **given)


def make_core_attention(**given):
    call = {"attn_mask_type": AttnMaskType.causal, "attention_type": "self"} | given
    CoreAttention(SimpleNamespace(kv_channels=4), 1, **call)


def call_loss_head(**given):
    LossHead.forward(None, X, labels=torch.zeros(1, 2), **given)


UNSUPPORTED = [
    *((call_layer, name, X) for name in layers._LAYER),
    *((call_self_attention, name, X) for name in attention._SELF_ATTENTION),
    (call_core_attention, "attention_mask", X),
    (call_core_attention, "attention_bias", X),
    *((call_core_attention, "attn_mask_type", kind) for kind in AttnMaskType if kind.value != 2),
    (call_core_attention, "attn_mask_type", None),
    *((make_core_attention, "attn_mask_type", kind) for kind in AttnMaskType if kind.value != 2),
    (make_core_attention, "attention_type", "cross"),
    (make_core_attention, "cp_comm_type", "a2a"),
    (call_mlp, "per_token_scale", X),
    (call_linear, "bias", X),
    (call_linear, "gradient_accumulation_fusion", False),
    (call_linear, "allreduce_dgrad", True),
    (call_linear, "sequence_parallel", True),
    (call_linear, "tp_group", object()),
    (call_linear, "grad_output_buffer", [X]),
    (call_loss_head, "runtime_gather_output", True),
]


@pytest.mark.parametrize(("call", "name", "value"), UNSUPPORTED)
def test_an_argument_that_is_not_implemented_is_refused(call, name, value):
    with pytest.raises(ConfigError, match=f"got {name}=.*; expected .*; remove") as caught:
        call(**{name: value})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("call", [call_layer, call_self_attention, call_core_attention, call_mlp])
def test_an_unknown_argument_is_refused(call):
    with pytest.raises(ConfigError, match="got the unknown argument sink; expected"):
        call(sink=None)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        (TransformerLayer._forward_attention, layers._LAYER),
        (Attention.forward, attention._SELF_ATTENTION),
        (DotProductAttention.forward, attention._CORE_ATTENTION),
    ],
)
def test_every_argument_of_megatron_core_is_known(theirs, ours):
    assert inspect.signature(theirs).parameters.keys() - READ == ours.keys()
