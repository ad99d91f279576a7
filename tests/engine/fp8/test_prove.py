"""The smallest form of `make prove-fp8`, and what it passes and fails."""

from pathlib import Path

import pytest

from tests.support.in_process import write_recipe
from tools.prove_fp8 import RECIPE, Proof, compared


@pytest.mark.parametrize(
    ("losses", "resumes", "passed"),
    [
        ([2.0, 3.02], True, True),
        ([1.985, 3.0], True, True),
        ([2.0, 3.04], True, False),
        ([1.97, 3.0], True, False),
        ([float("nan"), 3.0], True, False),
        ([2.0, 3.0], False, False),
    ],
)
def test_verdict(losses: list[float], resumes: bool, passed: bool) -> None:
    proof = Proof(RECIPE, Path(), 200, (1, 2))
    row = compared(proof, "rowwise", losses, [2.0, 3.0], resumes=resumes)
    assert row["passed"] is passed and row["resumes_bitwise"] is resumes


@pytest.mark.slow
def test_a_few_steps_of_one_seed(tmp_path: Path) -> None:
    write_recipe(
        tmp_path,
        *("model.num_layers=3", "model.hidden_size=128", "model.intermediate_size=128"),
        *("precision.dtype=bf16", "precision.fp8=torch", "precision.fp8_recipe=blockwise"),
        *("model.init_std=0.02", "batch.global_batch_size=4", "batch.micro_batch_size=4"),
    )
    proof = Proof(tmp_path / "recipe.toml", tmp_path, 3, (1,))
    bf16, losses = proof.final_losses("precision.fp8=off"), proof.final_losses()
    row = compared(proof, "blockwise", losses, bf16, resumes=proof.resumes(steps=4))
    assert row["passed"] and row["loss"] != row["bf16_loss"]
