"""FP8 through Transformer Engine on a stand-in of its interface: the spec, steps, and their state.

No GPU has run it. What is shown is that every call fits the published signatures of each version,
and what the engine does around the linears.
"""

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from tests.support.te_runs import (
    VERSIONS,
    engine_in,
    load,
    run_with_te,
    save,
    sizes,
    states_of,
    steps,
)

pytestmark = pytest.mark.slow

RECIPES = ("tensorwise", "blockwise", "delayed")
NUM_LAYERS = 4
MICRO_BATCHES = 2


def evaluate(engine: Any, step: int) -> float:
    from phi4.stages.pretrain import NextToken
    from tests.support.engines import batches_of

    return engine.evaluate(batches_of(engine, step), NextToken()).loss


def facts(rank: int, scaling: str, *overrides: str, at: Path) -> dict[str, Any]:
    """Two steps of a recipe, and what the model is made of."""
    from phi4.engine.model.fp8.layers import forget_weights
    from phi4.engine.model.fp8.te_state import te_linears
    from tests.support.engines import tiny_recipe

    recipe = tiny_recipe(*sizes(scaling, *overrides))
    with engine_in(rank, recipe, at) as engine:
        entered = contexts(engine)
        results = steps(engine, 0, 2)
        linears = dict(te_linears(engine.bare_chunks))
        cached = [linear.is_first_microbatch for linear in linears.values()]
        forget_weights(engine.bare_chunks)
        return {
            "results": results,
            "entered": entered,
            "cached": (cached, [linear.is_first_microbatch for linear in linears.values()]),
            "weights": {type(one) for one in engine.bare_chunks[0].parameters()},
            "settings": (engine.config.fp8, engine.config.fp8_param, engine.config.tp_comm_overlap),
            "second linear": linear_behind_a_kernel(engine) if linears else "",
            "choices": [choice.describe() for choice in engine.choices],
            "counts": {
                name: (linear.num_weight_casts, linear.num_fp8_products)
                for name, linear in linears.items()
            },
            "parameters": [name for name, _ in engine.bare_chunks[0].named_parameters()],
            "extra_state": [
                value
                for key, value in engine.bare_chunks[0].state_dict().items()
                if key.endswith("_extra_state")
            ],
            "scalings": states_of(engine),
        }


def contexts(engine: Any) -> dict[int, set[bool]]:
    """By layer: whether its forward passes from now on are in a context of FP8."""
    from transformer_engine.pytorch.quantization import FP8GlobalStateManager

    layers = engine.bare_chunks[0].decoder.layers
    entered: dict[int, set[bool]] = {index: set() for index in range(len(layers))}
    for index, layer in enumerate(layers):
        layer.register_forward_pre_hook(
            lambda *_, index=index: entered[index].add(FP8GlobalStateManager.is_fp8_enabled())
        )
    return entered


def linear_behind_a_kernel(engine: Any) -> str:
    """What follows SwiGLU where a kernel serves it."""
    from phi4.engine.model.layers import SwiGLU

    linears = engine.bare_chunks[0].decoder.layers[1].mlp.linears
    kernels = type("Kernels", (SwiGLU,), {"implementation": "triton", "linears": linears})
    with engine.patches:
        return type(kernels(engine.config).linear_fc2).__name__


def train(rank: int, at: Path) -> dict[str, Any]:
    """The facts of every recipe, and of bf16; the names that were called."""
    found = {scaling: facts(rank, scaling, at=at / scaling) for scaling in RECIPES}
    found["off"] = facts(rank, "tensorwise", "precision.fp8=off", at=at / "off")
    recompute = ("recompute.granularity=full",)
    found["recompute"] = facts(rank, "tensorwise", *recompute, at=at / "recompute")
    selective = ("recompute.granularity=selective",)
    found["selective"] = facts(rank, "tensorwise", *selective, at=at / "selective")
    root = at / "checkpoints"
    root.mkdir()
    found["saved"] = save_and_return(rank, root, at / "saving", ())
    found["resumed"] = resume(rank, root, at / "resuming", ())
    from transformer_engine.interface import CALLED

    return found | {"refused": refused(), "called": set(CALLED)}


def refused() -> str:
    """What is said where Transformer Engine cannot multiply by one of the recipes."""
    from transformer_engine.pytorch.quantization import FP8GlobalStateManager

    from phi4.config import PrecisionConfig
    from phi4.engine.model.fp8.te_backend import check_backend
    from phi4.engine.platform import Platform
    from phi4.errors import PlatformError

    gpu = Platform("cuda", torch.device("cuda"), 0, 1, "")
    tensorwise, blockwise = (
        PrecisionConfig(fp8="te", fp8_recipe=scaling) for scaling in ("tensorwise", "blockwise")
    )
    check_backend(blockwise, gpu)
    ask = "is_fp8_block_scaling_available"
    answer = mock.Mock(return_value=(False, "needs CUDA 12.9."))
    with mock.patch.object(FP8GlobalStateManager, ask, answer):
        check_backend(tensorwise, gpu)
        try:
            check_backend(blockwise, gpu)
        except PlatformError as error:
            return str(error)
    return ""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    [found] = run_with_te(train, tmp_path_factory.mktemp("meetings"))
    return found


@pytest.mark.parametrize("version", VERSIONS[:-1])
def test_a_step_calls_what_an_older_version_has(version: str, trained: dict, tmp_path: Path):
    [found] = run_with_te(train, tmp_path, version=version)
    assert found["called"] == trained["called"]
    assert found["tensorwise"]["results"] == trained["tensorwise"]["results"]


def test_the_calls_of_a_step_are_those_that_the_table_lists(trained: dict):
    assert trained["called"] == {
        "Linear.__init__",
        "Linear.forward",
        "TransformerEngineBaseModule.init_fp8_meta_tensors",
        "FP8GlobalStateManager.reduce_and_update_fp8_tensors",
        "FP8GlobalStateManager.reset",
        "FP8GlobalStateManager.is_fp8_available",
        "FP8GlobalStateManager.is_fp8_enabled",
        "FP8GlobalStateManager.is_fp8_block_scaling_available",
        "fp8_autocast",
        "get_dummy_wgrad",
        "checkpoint",
    }


@pytest.mark.parametrize("scaling", RECIPES)
def test_every_linear_multiplies_in_fp8_and_casts_its_weight_once_a_step(
    trained: dict, scaling: str
):
    layers = range(NUM_LAYERS) if scaling == "delayed" else range(1, NUM_LAYERS - 1)
    names = ("linear_proj", "linear_qkv", "linear_fc1", "linear_fc2")
    counts = trained[scaling]["counts"]
    assert sorted(counts) == sorted(
        f"layers.{layer}.{'self_attention' if name in names[:2] else 'mlp'}.{name}"
        for layer in layers
        for name in names
    )
    # Two steps; forward, input gradient and weight gradient of every micro-batch.
    assert set(counts.values()) == {(2, 2 * MICRO_BATCHES * 3)}
    assert (
        f"linear: te (precision.fp8=te, precision.fp8_recipe={scaling}, version 2.11.0)"
        in (trained[scaling]["choices"])
    )


@pytest.mark.parametrize("scaling", RECIPES)
def test_losses_are_near_those_of_bf16_and_not_the_same(trained: dict, scaling: str):
    for got, expected in zip(trained[scaling]["results"], trained["off"]["results"], strict=True):
        assert got[0] != expected[0] and got == pytest.approx(expected, rel=0.03)


def test_parameters_are_those_of_bf16(trained: dict):
    for scaling in RECIPES:
        assert trained[scaling]["parameters"] == trained["off"]["parameters"]
        # Not tensors in FP8: masters, optimizer and checkpoints find what they do in bf16.
        assert trained[scaling]["weights"] == {torch.nn.Parameter}
    assert not trained["off"]["counts"]


@pytest.mark.parametrize("scaling", RECIPES)
def test_end_layers_are_in_no_context_of_fp8(trained: dict, scaling: str):
    inner = range(NUM_LAYERS) if scaling == "delayed" else range(1, NUM_LAYERS - 1)
    assert trained[scaling]["entered"] == {layer: {layer in inner} for layer in range(NUM_LAYERS)}


def test_a_kernel_s_swiglu_stands_before_a_linear_in_fp8(trained: dict):
    assert trained["tensorwise"]["second linear"] == "TERowLinear"


def test_a_weight_that_may_have_changed_is_cast_again(trained: dict):
    before, after = trained["tensorwise"]["cached"]
    assert set(before) == {False} and set(after) == {True}


def test_megatron_core_is_told_of_the_format_and_of_nothing_else(trained: dict):
    settings = {scaling: trained[scaling]["settings"] for scaling in (*RECIPES, "off")}
    assert settings == {
        "tensorwise": ("hybrid", False, False),
        "blockwise": ("e4m3", False, False),
        "delayed": ("hybrid", False, False),
        "off": (None, False, False),
    }


@pytest.mark.parametrize("how", ["recompute", "selective"])
def test_recompute_changes_nothing(trained: dict, how: str):
    assert trained[how]["results"] == trained["tensorwise"]["results"]


def test_a_gpu_that_cannot_is_asked_by_recipe(trained: dict):
    assert trained["refused"] == (
        "precision.fp8=te with precision.fp8_recipe=blockwise cannot run here: needs CUDA 12.9. "
        "Use precision.fp8=torch, or off"
    )


@pytest.mark.parametrize("scaling", RECIPES)
def test_no_state_is_a_pickle(trained: dict, scaling: str):
    assert set(trained[scaling]["extra_state"]) == {None}
    assert bool(trained[scaling]["scalings"]) == (scaling == "delayed")


def save_and_return(rank: int, root: Path, at: Path, layout: tuple[str, ...]) -> dict[str, Any]:
    """Two steps, a checkpoint, a third step; then back to the checkpoint, and the third again."""
    from tests.support.engines import tiny_recipe

    with engine_in(rank, tiny_recipe(*sizes("delayed", *layout)), at) as engine:
        steps(engine, 0, 2)
        save(engine, root, 2)
        found = {"states": states_of(engine), "next": steps(engine, 2, 3)}
        load(engine, root)
        # What an evaluation casts is no part of training.
        evaluate(engine, 7)
        return found | {"again": steps(engine, 2, 3)}


def resume(rank: int, root: Path, at: Path, layout: tuple[str, ...]) -> dict[str, Any]:
    """A new engine that goes on from the checkpoint, perhaps in another layout."""
    from tests.support.engines import tiny_recipe

    with engine_in(rank, tiny_recipe(*sizes("delayed", *layout)), at) as engine:
        before = states_of(engine)
        load(engine, root)
        return {"before": before, "states": states_of(engine), "next": steps(engine, 2, 3)}


ZERO = "parallel.distributed_optimizer=true"
TP2 = ("parallel.tensor=2", "parallel.sequence=true", ZERO)


def test_delayed_scaling_goes_on_from_a_checkpoint_with_the_same_bits(trained: dict):
    alone, new = trained["saved"], trained["resumed"]
    assert alone["again"] == alone["next"] == new["next"]
    scales = [state[0] for state in new["before"].values()]
    assert all(torch.equal(scale, torch.ones_like(scale)) for scale in scales)
    for name, state in alone["states"].items():
        assert torch.equal(state, new["states"][name])
        # A history of two micro-batches of each of two steps, none of the one to come.
        rows = (state[1:] > 0).any(dim=1).nonzero().flatten().tolist()
        assert rows == list(range(1024 - 2 * MICRO_BATCHES, 1024))


def test_tensor_ranks_agree_on_scales_and_another_layout_loads_them(tmp_path: Path):
    root = tmp_path / "checkpoints"
    root.mkdir()
    first, second = run_with_te(save_and_return, root, tmp_path / "a", TP2, num_ranks=2)
    assert first["again"] == first["next"] == second["next"]
    [alone] = run_with_te(resume, root, tmp_path / "b", (ZERO,))
    for name, state in alone["states"].items():
        assert torch.equal(state, first["states"][name])
        assert torch.equal(state, second["states"][name])
    assert alone["next"][0] == pytest.approx(first["next"][0], rel=2e-3)
