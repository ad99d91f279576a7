"""Phi-4's figures against the numbers that its report, its card and its public files give."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phi4.config import ModelConfig
from phi4.model import shape

PHI4 = ModelConfig()


def test_parameters_equal_the_released_models_count():
    assert shape.num_parameters(PHI4) == 14_659_507_200
    assert shape.num_layer_parameters(PHI4) == 340_797_440
    assert shape.num_matmul_parameters(PHI4) == 14_145_290_240
    assert shape.weight_bytes(PHI4, "bf16") == 29_319_014_400


def test_tensor_kinds_have_the_released_models_shapes():
    assert {kind.role: kind.shape for kind in shape.tensor_kinds(PHI4)} == {
        "embedding": (100_352, 5120),
        "input_norm": (5120,),
        "qkv": (7680, 5120),
        "attention_out": (5120, 5120),
        "mlp_norm": (5120,),
        "gate_up": (35_840, 5120),
        "down": (5120, 17_920),
        "final_norm": (5120,),
        "head": (100_352, 5120),
    }


@pytest.mark.parametrize(
    ("sequence_length", "causal", "full"),
    [(4096, 5_033_164_800, 10_066_329_600), (16_384, 20_132_659_200, 40_265_318_400)],
)
def test_flops_per_token_equal_the_published_arithmetic(sequence_length, causal, full):
    flops = shape.training_flops_per_token(PHI4, sequence_length)

    assert flops.matmul == 84_871_741_440
    assert flops.causal - flops.matmul == causal
    assert flops.full - flops.matmul == full
    assert flops.six_n == 87_957_043_200


def test_mfu_of_the_cards_run_is_a_quarter_of_an_h100():
    """9.8T tokens in 21 days on 1,920 GPUs of 989.4 TFLOP/s: 25.6% by the causal count."""
    tokens_per_second = 9.8e12 / (1920 * 21 * 86_400)
    flops = shape.training_flops_per_token(PHI4, 4096)

    assert f"{tokens_per_second * flops.causal / 989.4e12:.1%}" == "25.6%"
    assert f"{tokens_per_second * flops.full / 989.4e12:.1%}" == "27.0%"
    assert f"{tokens_per_second * flops.six_n / 989.4e12:.1%}" == "25.0%"


def test_kv_cache_is_200_kib_per_token():
    assert shape.kv_cache_bytes_per_token(PHI4) == 204_800
    assert shape.kv_cache_bytes_per_token(PHI4, "fp32") == 409_600


def test_training_state_is_18_bytes_in_bf16_and_16_in_fp32():
    assert shape.training_bytes_per_parameter("bf16") == 18
    assert shape.training_bytes_per_parameter("fp32") == 16


@given(
    tp_size=st.sampled_from([1, 2, 5, 10]),
    stages=st.lists(st.integers(0, 20), min_size=1, max_size=6),
)
def test_rank_parameters_sum_to_the_model_plus_the_copied_norms(tp_size, stages):
    model = PHI4.model_copy(update={"num_layers": sum(stages)})
    total = sum(
        tp_size
        * shape.num_rank_parameters(
            model, layers, tp_size, first=stage == 0, last=stage == len(stages) - 1
        )
        for stage, layers in enumerate(stages)
    )
    norms = (2 * model.num_layers + 1) * model.hidden_size

    assert total == shape.num_parameters(model) + (tp_size - 1) * norms


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (3 * 1024, "3.0 KiB"),
        (1020 * 2**20, "1020.0 MiB"),
        (29_319_014_400, "27.3 GiB"),
        (3 * 2**50, "3,072.0 TiB"),
    ],
)
def test_format_bytes_uses_binary_units(count, text):
    assert shape.format_bytes(count) == text
