"""Planned bytes against the buffers of real ranks, and the arithmetic of a plan."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from phi4.config import CheckpointConfig, Recipe, with_overrides
from phi4.engine.checkpoint import optimizer_format
from phi4.errors import LayoutError
from phi4.plan import CARDS, make_plan
from phi4.plan.memory import GRADIENT_BYTES, optimizer_bytes_per_parameter
from tests.support.ranks import run_ranks

NUM_TENSORS = 15
"""Of TINY. The distributed optimizer aligns each to 64 elements and pads the buffer to 128."""
H100 = CARDS["h100"]
TINY = with_overrides(
    Recipe(),
    [
        "model.num_layers=2",
        "model.hidden_size=64",
        "model.num_attention_heads=4",
        "model.num_key_value_heads=2",
        "model.intermediate_size=96",
        "model.vocab_size=256",
        "data.sequence_length=32",
        "data.unit_tokens=32",
    ],
)


def measure(rank: int, world_size: int, recipes: list[Recipe], directory: str) -> list[dict]:
    """`state_bytes` of one rank under each recipe."""
    from phi4.engine.engine import Engine
    from phi4.engine.platform import connect, disconnect

    platform = connect("cpu", rank=rank, world_size=world_size, rendezvous=directory)
    measured = []
    for recipe in recipes:
        engine = Engine(recipe, platform)
        measured.append(state_bytes(engine, recipe))
        engine.close()
    disconnect()
    return measured


def state_bytes(engine: Any, recipe: Recipe) -> dict[str, int]:
    """Weights, gradient buffers and optimizer state of this rank after a first step."""
    for chunk in engine.chunks:
        for parameter in chunk.parameters():
            parameter.main_grad.fill_(1.0)
    with engine.patches:
        engine.optimizer.step(torch.ones((), dtype=torch.float64), torch.tensor(True))
    parameters = list(engine.bare_chunks[0].parameters())
    buffers = [buffer for chunk in engine.chunks for buffer in chunk.buffers]
    state: dict[int, int] = {}
    for optimizer in engine.optimizer.chained_optimizers:
        for master, moments in optimizer.optimizer.state.items():
            kept = [moments["exp_avg"], moments["exp_avg_sq"]]
            # fp32 weights are their own master.
            kept += [master] if recipe.precision.dtype == "bf16" else []
            state |= {t.data_ptr(): t.numel() * t.element_size() for t in kept}
    return {
        "weights": sum(p.numel() * p.element_size() for p in parameters),
        "gradients": sum(b.grad_data.numel() * b.grad_data.element_size() for b in buffers),
        "optimizer": sum(state.values()),
    }


def test_state_is_what_two_ranks_hold(tmp_path: Path) -> None:
    recipes = [
        with_overrides(
            TINY,
            [
                "parallel.data=2",
                f"parallel.distributed_optimizer={distributed}",
                f"precision.dtype={dtype}",
            ],
        )
        for dtype in ("bf16", "fp32")
        for distributed in ("true", "false")
    ]
    ranks = run_ranks(2, measure, recipes, str(tmp_path))
    for recipe, *measured in zip(recipes, *ranks, strict=True):
        (stage,) = make_plan(recipe, 2, H100).stages
        padding = 4 * NUM_TENSORS * 128 if recipe.parallel.distributed_optimizer else 0
        for rank in measured:
            assert rank["weights"] == stage.weights
            assert 0 <= rank["gradients"] - stage.gradients <= padding
        assert sum(rank["optimizer"] for rank in measured) == 2 * stage.optimizer


def test_casts_of_weights_take_two_bytes_each() -> None:
    recipe = with_overrides(
        TINY,
        [
            *("model.num_layers=6", "precision.fp8_end_layers_in_bf16=1"),
            *("parallel.tensor=2", "parallel.pipeline=2", "data.sequence_length=64"),
        ],
    )
    plain = make_plan(recipe, 4, H100).stages
    stages, of_te = (
        make_plan(with_overrides(recipe, [f"precision.fp8={fp8}"]), 4, H100).stages
        for fp8 in ("torch", "te")
    )
    # Of two layers: queries, keys and values, projection, both linears of the MLP.
    weights = 2 * 64 * ((4 + 2 * 2) * 16 + 64 + 3 * 96) // 2
    for stage, without in zip(stages, plain, strict=True):
        assert stage.weights == without.weights + 2 * weights
        assert stage.activations < without.activations
    for stage, without in zip(of_te, plain, strict=True):
        # Its activations are not counted in FP8.
        assert stage.weights == without.weights + 2 * weights
        assert stage.activations == without.activations


def test_gather_in_fp8_sends_one_byte_less_per_weight() -> None:
    recipe = with_overrides(
        TINY,
        [
            *("model.num_layers=6", "precision.fp8_end_layers_in_bf16=1", "precision.fp8=torch"),
            *("parallel.pipeline=3", "parallel.distributed_optimizer=true"),
            "data.sequence_length=64",
        ],
    )
    plain = make_plan(recipe, 6, H100).stages
    stages = make_plan(with_overrides(recipe, ["parallel.fp8_param_gather=true"]), 6, H100).stages
    weights = 64 * ((4 + 2 * 2) * 16 + 64 + 3 * 96)
    for stage, without, num_layers in zip(stages, plain, (1, 2, 1), strict=True):
        whole = 2 * stage.num_parameters
        # Half of it is this data rank's own.
        assert stage.gather.received_bytes == (whole - num_layers * weights) // 2
        assert without.gather.received_bytes == stage.gather.plain_bytes == whole // 2
        assert (stage.gather.message_bytes, without.gather.message_bytes) == (whole * 3 // 2, 0)


def test_peak_is_that_of_passes_or_of_messages() -> None:
    recipe = with_overrides(
        TINY,
        ["model.num_layers=4", "precision.fp8=torch", "parallel.distributed_optimizer=true"],
    )
    [plain] = make_plan(recipe, 2, H100).stages
    [stage] = make_plan(with_overrides(recipe, ["parallel.fp8_param_gather=true"]), 2, H100).stages
    passes = plain.activations + plain.loss_head + plain.working + plain.batch
    assert stage.gather.message_bytes < passes and stage.total == plain.total
    larger = replace(stage.gather, message_bytes=passes + 7)
    assert replace(stage, gather=larger).total == plain.total + 7


def test_optimizer_is_split_over_data_and_context_ranks() -> None:
    recipe = with_overrides(TINY, ["parallel.data=3", "parallel.context=2"])
    assert optimizer_bytes_per_parameter(recipe, distributed=False) == 12
    assert optimizer_bytes_per_parameter(recipe, distributed=True) == 2
    fp32 = with_overrides(recipe, ["precision.dtype=fp32"])
    assert optimizer_bytes_per_parameter(fp32, distributed=True) == pytest.approx(8 / 6)
    assert torch.float32.itemsize == GRADIENT_BYTES


def test_data_ranks_follow_from_the_gpus() -> None:
    recipe = with_overrides(TINY, ["parallel.tensor=2", "parallel.data=7"])
    plan = make_plan(recipe, 8, H100)
    assert plan.recipe.parallel.data == 4
    assert plan.num_microbatches == 2
    with pytest.raises(LayoutError, match=r"--gpus 7 is not a multiple of tensor=2 .* = 2; change"):
        make_plan(recipe, 7, H100)
    with pytest.raises(LayoutError, match="global_batch_size=8 is not a multiple"):
        make_plan(recipe, 6, H100)


@pytest.mark.parametrize("gib", [1, 700, 702, 4000])
def test_predicted_save_is_the_engines(gib: int) -> None:
    recipe = with_overrides(
        Recipe(),
        [
            "parallel.tensor=2",
            "parallel.pipeline=4",
            "parallel.distributed_optimizer=true",
            "batch.global_batch_size=16",
        ],
    )
    plan = make_plan(recipe, 64, H100)
    largest = max(stage.num_parameters for stage in plan.stages)
    assert plan.gather_bytes == 12 * largest * 8
    assert make_plan(recipe, 64, H100, gpus_per_node=4).gather_bytes == 12 * largest * 4
    form, _ = optimizer_format(CheckpointConfig(), plan.gather_bytes, gib * 2**30)
    assert form == plan.save_format(gib * 2**30)


def test_nothing_is_gathered_without_the_distributed_optimizer() -> None:
    plan = make_plan(TINY, 1, H100)
    assert (plan.gather_bytes, plan.save_format(1)) == (0, "full")


def test_loss_head_and_deep_pipeline_show_in_the_stages() -> None:
    recipe = with_overrides(
        Recipe(), ["parallel.pipeline=4", "parallel.layers_per_stage=[12,11,10,7]"]
    )
    stages = make_plan(recipe, 4, H100).stages
    assert [stage.layers for stage in stages] == [(12,), (11,), (10,), (7,)]
    assert [stage.in_flight for stage in stages] == [(4,), (3,), (2,), (1,)]
    per_layer = stages[1].activations / (3 * 11)
    assert [round(s.activations / per_layer) for s in stages] == [48, 33, 20, 7]
    assert [stage.loss_head > 0 for stage in stages] == [False, False, False, True]
    # bf16 logits of 4,096 tokens over the whole vocabulary, two hidden states, small change.
    assert stages[3].loss_head == pytest.approx(4096 * (2 * 100_352 + 4 * 5120), rel=1e-3)
