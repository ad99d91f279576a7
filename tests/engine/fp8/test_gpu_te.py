"""FP8 through Transformer Engine on a GPU, which no test on a CPU can show; part of `make gpu`."""

from pathlib import Path

import pytest
import torch

from tests.support.engines import tiny_recipe
from tests.support.te_runs import engine_in, load, save, sizes, states_of, steps

RECIPES = ("tensorwise", "blockwise", "delayed")


@pytest.fixture(autouse=True)
def needs_transformer_engine() -> None:
    from phi4.engine.te_import import TRANSFORMER_ENGINE

    if TRANSFORMER_ENGINE.problem:
        pytest.skip(f"Transformer Engine: {TRANSFORMER_ENGINE.problem}")


@pytest.mark.gpu
@pytest.mark.parametrize("scaling", RECIPES)
def test_losses_are_near_those_of_bf16_and_not_the_same(scaling: str, tmp_path: Path) -> None:
    from phi4.engine.model.fp8.te_state import te_linears

    results = {}
    for fp8 in ("off", "te"):
        recipe = tiny_recipe(*sizes(scaling, f"precision.fp8={fp8}"))
        with engine_in(0, recipe, tmp_path / fp8, "cuda") as engine:
            results[fp8] = steps(engine, 0, 10)
            linears = [linear for _, linear in te_linears(engine.bare_chunks)]
            assert bool(linears) == (fp8 == "te") and all(linear.fp8 for linear in linears)
    for got, expected in zip(results["te"], results["off"], strict=True):
        assert got[0] != expected[0] and got == pytest.approx(expected, rel=0.05)


@pytest.mark.gpu
def test_delayed_scaling_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    recipe = tiny_recipe(*sizes("delayed"))
    root = tmp_path / "checkpoints"
    root.mkdir()
    with engine_in(0, recipe, tmp_path / "a", "cuda") as engine:
        steps(engine, 0, 3)
        states = states_of(engine)
        save(engine, root, 3)
        expected = steps(engine, 3, 5)
    assert all((state[1:] > 0).any() for state in states.values())
    with engine_in(0, recipe, tmp_path / "b", "cuda") as engine:
        load(engine, root)
        assert all(torch.equal(state, states[name]) for name, state in states_of(engine).items())
        for got, wanted in zip(steps(engine, 3, 5), expected, strict=True):
            assert got == pytest.approx(wanted, rel=1e-3)
