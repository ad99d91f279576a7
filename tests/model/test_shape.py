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


@pytest.mark.parametrize(
    ("sequence_length", "causal", "full"), [(4096, "89.9", "94.9"), (16_384, "105.0", "125.1")]
)
def test_gigaflops_per_token_are_the_hand_computed_ones(sequence_length, causal, full):
    flops = shape.training_flops_per_token(PHI4, sequence_length)

    assert f"{flops.causal / 1e9:.1f}" == causal
    assert f"{flops.full / 1e9:.1f}" == full


def work_of_documents(lengths: list[int]) -> shape.Work:
    return shape.Work(sum(lengths), sum(length**2 for length in lengths))


@given(lengths=st.lists(st.integers(1, 4096), min_size=1, max_size=8))
def test_flops_of_packed_documents_are_the_sum_of_each_alone(lengths):
    """However a row is cut into documents: each costs what a row of its length costs."""
    packed = shape.training_flops(PHI4, work_of_documents(lengths))
    alone = [(shape.training_flops_per_token(PHI4, length), length) for length in lengths]

    for name in ("matmul", "attention_causal", "attention_full", "six_n", "causal", "full"):
        parts = [getattr(flops, name) * length for flops, length in alone]
        assert getattr(packed, name) == sum(parts)
    whole = shape.training_flops(PHI4, work_of_documents([sum(lengths)]))
    assert packed.matmul == whole.matmul
    assert (packed.full < whole.full) == (len(lengths) > 1)


def test_a_second_label_costs_one_row_of_the_head():
    alone = shape.training_flops(PHI4, shape.Work(4096, 4096**2))
    with_pivots = shape.training_flops(PHI4, shape.Work(4096, 4096**2, num_second_labels=3))

    assert with_pivots.full - alone.full == 3 * 6 * 100_352 * 5120
    assert with_pivots.attention_full == alone.attention_full


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
