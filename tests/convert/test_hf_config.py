"""config.json: Phi-4's own values, and what a foreign one is refused for."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phi4.config import ModelConfig
from phi4.convert.hf_config import hf_config, model_config
from phi4.errors import ConfigError


def phi4_config(**changes):
    model = ModelConfig(rope_theta=250_000.0)
    raw = hf_config(model, dtype="bf16", bos_id=100_257, eos_id=100_265, pad_id=100_349)
    return {key: value for key, value in (raw | changes).items() if value != "absent"}


def test_config_carries_both_keys_of_rope_and_dtype():
    raw = phi4_config()

    assert raw["rope_theta"] == raw["rope_parameters"]["rope_theta"] == 250_000
    assert raw["torch_dtype"] == raw["dtype"] == "bfloat16"


def test_config_equals_the_released_one_after_the_eos_fix():
    """The released file, with the ids of January 2025; its RoPE and dtype keys are version 4's."""
    released = {
        "architectures": ["Phi3ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 100_257,
        "embd_pdrop": 0.0,
        "eos_token_id": 100_265,
        "hidden_act": "silu",
        "hidden_size": 5120,
        "initializer_range": 0.02,
        "intermediate_size": 17_920,
        "max_position_embeddings": 16_384,
        "model_type": "phi3",
        "num_attention_heads": 40,
        "num_hidden_layers": 40,
        "num_key_value_heads": 10,
        "original_max_position_embeddings": 16_384,
        "pad_token_id": 100_349,
        "resid_pdrop": 0.0,
        "rms_norm_eps": 1e-5,
        "rope_scaling": None,
        "rope_theta": 250_000,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.47.0",
        "use_cache": True,
        "vocab_size": 100_352,
    }
    version_5 = {"dtype", "rope_parameters"}

    assert {k: v for k, v in phi4_config().items() if k not in version_5} == released


@given(
    kv_heads=st.integers(1, 12),
    per_group=st.integers(1, 6),
    theta=st.floats(1.5, 1e7),
    eps=st.floats(1e-8, 1e-3),
    layers=st.integers(1, 99),
)
def test_reading_inverts_writing(kv_heads, per_group, theta, eps, layers):
    heads = kv_heads * per_group
    model = ModelConfig(
        num_layers=layers,
        hidden_size=16 * heads,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        rope_theta=theta,
        rms_norm_eps=eps,
    )
    assert model_config(hf_config(model, dtype="fp32", bos_id=1, eos_id=2, pad_id=3)) == model


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_parameters": "absent"},
        {"rope_theta": "absent"},
        {"rope_scaling": "absent", "sliding_window": "absent", "attention_bias": "absent"},
        {"partial_rotary_factor": 1.0, "head_dim": 128},
        {"sliding_window": 16_384},
    ],
)
def test_other_spellings_of_the_same_model_are_read(changes):
    assert model_config(phi4_config(**changes)) == ModelConfig(rope_theta=250_000.0)


def test_missing_kv_heads_mean_one_per_query_head():
    assert model_config(phi4_config(num_key_value_heads=None)).num_key_value_heads == 40


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama"}, "model_type='llama', expected 'phi3'"),
        ({"hidden_size": "absent"}, "hidden_size is missing; add it"),
        ({"hidden_size": "5120"}, "hidden_size='5120': Input should be a valid integer"),
        ({"num_hidden_layers": 0}, "num_layers=0: Input should be greater than or equal to 1"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu', but Phi-4 has hidden_act='silu'"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings=True"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"sliding_window": 2047}, "sliding_window=2047 is below max_position_embeddings=16384"),
        ({"sliding_window": "all"}, "sliding_window='all' is below"),
        ({"rope_scaling": {"type": "longrope"}}, "rope_scaling is of type 'longrope'"),
        ({"rope_scaling": "yarn"}, "rope_scaling='yarn', expected a table or null"),
        (
            {"rope_parameters": {"rope_type": "longrope", "rope_theta": 250_000.0}},
            "rope_parameters is of type 'longrope'",
        ),
        (
            {"rope_parameters": {"rope_theta": 250_000.0, "partial_rotary_factor": 0.75}},
            "partial_rotary_factor=0.75, but Phi-4 rotates all dimensions of a head",
        ),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ({"rope_theta": 10_000.0}, "RoPE base disagree: 250000.0 and 10000.0; make them equal"),
        ({"rope_theta": "absent", "rope_parameters": None}, "no RoPE base under"),
        ({"num_key_value_heads": 12}, "num_key_value_heads=12 are inconsistent"),
        ({"num_attention_heads": 30}, "num_attention_heads=30 and num_key_value_heads=10"),
        ({"head_dim": 64}, "head_dim=64, but Phi-4 has hidden_size / num_attention_heads = 128"),
    ],
)
def test_what_phi4_cannot_compute_is_refused_with_the_reason(changes, message):
    with pytest.raises(ConfigError) as caught:
        model_config(phi4_config(**changes))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_all_reasons_are_given_at_once():
    with pytest.raises(ConfigError, match=r"hidden_act='gelu'.*; .*sliding_window=9"):
        model_config(phi4_config(hidden_act="gelu", sliding_window=9))
