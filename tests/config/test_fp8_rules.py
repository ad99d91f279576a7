"""Sizes and layers that FP8 cannot take are one line with a remedy."""

import pytest

from phi4.config import Recipe, check, violations, with_overrides
from phi4.config.fp8_rules import fp8_layers
from phi4.engine.precision import describe_precision

SOUND = with_overrides(Recipe(), ["batch.global_batch_size=16", "precision.fp8=torch"])
BLOCKWISE = "precision.fp8_recipe=blockwise"
TP2_SP = ("parallel.tensor=2", "parallel.sequence=true")
GATHER = ("parallel.fp8_param_gather=true", "parallel.distributed_optimizer=true")


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        (["precision.fp8_end_layers_in_bf16=20"], "leaves none of model.num_layers=40 for FP8"),
        (["model.intermediate_size=17928"], "columns of the MLP 17928; change the model"),
        (
            ["model.intermediate_size=17936", *TP2_SP],
            "multiples of 16; got columns of the MLP 8968",
        ),
        (
            [*("data.sequence_length=4104", "data.unit_tokens=4104"), "parallel.context=3"],
            "tokens of a micro-batch 1368; change the model, batch.micro_batch_size or",
        ),
        ([BLOCKWISE, "model.intermediate_size=17936"], "multiples of 128; got columns of the MLP"),
        (
            [BLOCKWISE, "parallel.context=32", *TP2_SP],
            "got tokens of a micro-batch 64",
        ),
    ],
)
def test_what_fp8_cannot_take_is_refused(overrides: list[str], text: str) -> None:
    wrong = with_overrides(SOUND, ["model.max_position_embeddings=8192", *overrides])
    [line] = violations(wrong)
    assert text in line and "\n" not in line and "precision.fp8=off" in line
    check(with_overrides(wrong, ["precision.fp8=off"]))


@pytest.mark.parametrize(
    "overrides", [[], [BLOCKWISE], [BLOCKWISE, "parallel.context=16", *TP2_SP]]
)
def test_sizes_of_phi4_are_taken(overrides: list[str]) -> None:
    check(with_overrides(SOUND, overrides))


@pytest.mark.parametrize(
    ("override", "text"),
    [
        (
            "parallel.distributed_optimizer=false",
            "weights that are gathered, but parallel.distributed_optimizer=false; use "
            "parallel.distributed_optimizer=true",
        ),
        *(
            (
                f"precision.fp8={fp8}",
                "linears that cast bf16 weights to FP8 in torch, but "
                f"precision.fp8={fp8}; use precision.fp8=torch",
            )
            for fp8 in ("off", "te")
        ),
        *(
            (
                f"precision.fp8_recipe={scaling}",
                f"one scale per weight, but precision.fp8_recipe={scaling}; use "
                "precision.fp8_recipe=tensorwise",
            )
            for scaling in ("rowwise", "blockwise")
        ),
        (
            "precision.dtype=fp32",
            "masters apart from the weights, but precision.dtype=fp32; use precision.dtype=bf16",
        ),
    ],
)
def test_what_a_gather_in_fp8_cannot_take_is_refused(override: str, text: str) -> None:
    check(with_overrides(SOUND, GATHER))
    wrong = with_overrides(SOUND, [*GATHER, override])
    [line] = violations(wrong)
    assert line == (
        f"parallel.fp8_param_gather=true needs {text}, or parallel.fp8_param_gather=false"
    )
    check(with_overrides(wrong, ["parallel.fp8_param_gather=false"]))


def test_formats_are_named() -> None:
    assert describe_precision(with_overrides(SOUND, ["precision.fp8=off"])) == "bf16"
    layers = "bf16, layers 2 to 39 of 40 in FP8"
    assert describe_precision(with_overrides(SOUND, [BLOCKWISE])) == (
        f"{layers} (torch, blockwise), compared with bf16 every 100 steps"
    )
    for never in ("precision.fp8_check_every=0", "precision.fp8=te"):
        assert describe_precision(with_overrides(SOUND, [never])).endswith("with bf16 never")


def test_layers_in_fp8_are_those_between_the_ends() -> None:
    assert fp8_layers(SOUND) == range(1, 39)
    assert len(fp8_layers(with_overrides(SOUND, ["precision.fp8=off"]))) == 0
