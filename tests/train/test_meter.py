"""The numbers of a step: FLOPs by shape and documents, MFU only against a peak, keys explained."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import call, patch

import pytest

from phi4.config import ModelConfig, Recipe
from phi4.engine.memory_use import KeptBytes
from phi4.engine.step_values import StepResult
from phi4.model.shape import Work
from phi4.rundir.names import METRICS_FILE
from phi4.rundir.state import RunState
from phi4.rundir.step_log import read_metrics
from phi4.train.hooks import Progress
from phi4.train.meter import Meter, group_norms_due, speed_numbers
from phi4.train.peak import Peak, peak_of
from phi4.train.rank_memory import RankMemory
from tests.support.engines import tiny_recipe
from tests.support.in_process import phi4, write_recipe
from tests.support.metrics_page import unexplained
from tests.support.ranks import run_ranks

NONE = Peak(None, "MFU: not reported")
RESULT = StepResult(loss=2.0, weight=8.0, grad_norm=1.0, updated=True, metrics={})
FP8 = ("precision.dtype=bf16", "precision.fp8=torch")
MFU = {"mfu_causal", "mfu_full"}


def progress_of(result: StepResult, *, tokens: int = 8, seconds: float = 0.5) -> Progress:
    return Progress(
        state=RunState(),
        total_steps=2,
        step_tokens=tokens,
        step_seconds=seconds,
        learning_rate=1e-3,
        result=result,
    )


def meter_of(peak: Peak, said: list[str]) -> Meter:
    return Meter(tiny_recipe(), 2, peak, memory=dict, say=said.append)


@pytest.mark.parametrize("updated", [True, False])
def test_record_says_that_a_step_changed_nothing(updated: bool) -> None:
    record = meter_of(NONE, []).measure(progress_of(replace(RESULT, updated=updated)))

    assert record["tokens_per_second"] == 16
    assert record["tokens_per_second_per_gpu"] == 8
    assert record.get("skipped") == (None if updated else 1)


def test_public_row_of_a_15b_model_is_55_percent() -> None:
    """Nemotron-4 15B on 16 H100: 64 rows of 4,096 tokens in 2.812 s. Published as 62.5%, by a
    formula that takes its 8 key-value heads for 48. Its MLP is not gated: two matrices of 24,576
    have the parameters of our three of 16,384.
    """
    shape = {"num_layers": 32, "hidden_size": 6144, "intermediate_size": 16_384}
    heads = {"num_attention_heads": 48, "num_key_value_heads": 8, "vocab_size": 256_000}
    recipe = Recipe(model=ModelConfig(**shape, **heads))
    peak = peak_of(recipe, "NVIDIA H100 80GB HBM3")
    result = replace(RESULT, work=Work(64 * 4096, 64 * 4096**2))
    numbers = speed_numbers(recipe, progress_of(result, tokens=64 * 4096, seconds=2.812), 16, peak)

    assert f"{numbers['mfu_full']:.1%}" == "55.4%"
    assert f"{numbers['mfu_causal']:.1%}" == "52.5%"
    assert numbers["model_tflops_per_gpu"] == numbers["mfu_causal"] * 989.4
    assert round(numbers["tokens_per_second_per_gpu"]) == 5826


def test_a_row_of_short_documents_has_less_to_compute() -> None:
    recipe, peak = Recipe(), Peak(989.4, "")
    whole, split = (
        speed_numbers(recipe, progress_of(replace(RESULT, work=Work(16_384, squares))), 1, peak)
        for squares in (16_384**2, 16 * 1024**2)
    )
    assert split["mfu_full"] / whole["mfu_full"] == pytest.approx(87.388 / 125.137, rel=1e-4)


@pytest.mark.parametrize(
    ("overrides", "device", "tflops", "said"),
    [
        ((), None, None, "no peak is known for a CPU; set tracking.peak_tflops"),
        (("tracking.peak_tflops=0.5",), None, 0.5, "to 0.5 TFLOP/s per rank, from tracking.peak"),
        ((), "NVIDIA B200", None, "no peak is known for NVIDIA B200 (only for H100 SXM"),
        ((), "NVIDIA H200", None, "H200 SXM 141 GB is for bf16 and precision.dtype=fp32"),
        (("precision.dtype=bf16",), "NVIDIA H200", 989.4, "989.4 TFLOP/s per GPU, dense bf16"),
        (FP8, "NVIDIA H200", 989.4, "); products in FP8 can be faster than that"),
        (("tracking.peak_tflops=756",), "NVIDIA H200", 756.0, "756 TFLOP/s"),
    ],
)
def test_mfu_is_of_a_named_peak_or_absent(
    overrides: tuple[str, ...], device: str | None, tflops: float | None, said: str
) -> None:
    peak, lines = peak_of(tiny_recipe(*overrides), device), []
    meter = meter_of(peak, lines)
    meter.start(RunState())
    record = meter.measure(progress_of(RESULT))

    assert peak.tflops == tflops
    assert len(lines) == 1 and said in lines[0]
    assert record.keys() & MFU == (MFU if tflops else set())


def test_group_norms_are_due_when_asked_for() -> None:
    assert not any(group_norms_due(tiny_recipe(), step) for step in range(9))
    every = tiny_recipe("tracking.group_norms_every=3")
    assert [step for step in range(1, 9) if group_norms_due(every, step)] == [3, 6]


def test_peak_of_a_gpu_is_the_last_steps_and_the_rest_is_what_is_not_kept() -> None:
    engine = SimpleNamespace(platform=SimpleNamespace(kind="cuda", device="cuda:1"))
    memory = RankMemory(engine)
    with (
        patch("phi4.train.rank_memory.kept_bytes", return_value=KeptBytes(10, 20, 30)) as kept,
        patch("torch.cuda.max_memory_allocated", side_effect=[100, 70]),
        patch("torch.cuda.reset_peak_memory_stats") as reset,
    ):
        first, second = memory.numbers(), memory.numbers()
    static = {"memory/weights": 10, "memory/gradients": 20, "memory/optimizer": 30}
    assert first == static | {"memory/peak": 100, "memory/activations_and_rest": 40}
    assert second == static | {"memory/peak": 70, "memory/activations_and_rest": 10}
    assert reset.call_args_list == [call("cuda:1")] * 2 and kept.call_count == 1
    assert unexplained([first]) == []


# A real run.


def lines_of_a_run(rank: int, world_size: int, root: Path) -> tuple[str, list[dict[str, float]]]:
    code, printed = phi4(rank, world_size, root, ["train", "recipe.toml"])
    assert code == 0, printed
    return printed, read_metrics(root / "run" / METRICS_FILE)


def test_a_run_records_them_and_the_page_explains_every_key(tmp_path: Path) -> None:
    sources = "data.sources=[{name='a',path='tokens',weight=3},{name='b',path='tokens',weight=1}]"
    asked = ("tracking.group_norms_every=2", "tracking.peak_tflops=0.01", "evaluation.every=3")
    write_recipe(tmp_path, "run.steps=4", sources, *asked)
    [(printed, lines)] = run_ranks(1, lines_of_a_run, tmp_path)

    assert "MFU: relative to 0.01 TFLOP/s per rank, from tracking.peak_tflops" in printed
    assert unexplained(lines) == []
    for line in lines:
        assert line["memory/peak_resident"] >= line["memory/resident"] > line["memory/weights"] > 0
        # fp32: the weights are their own masters, and have two moments.
        assert line["memory/gradients"] == line["memory/weights"]
        assert line["memory/optimizer"] == 2 * line["memory/weights"]
        assert line["mfu_full"] > line["mfu_causal"] == line["model_tflops_per_gpu"] / 0.01 > 0
        norms = [value for key, value in line.items() if key.startswith("grad_norm/")]
        assert len(norms) == (5 if line["step"] % 2 == 0 else 0)
    assert [line["step"] for line in lines if "data/a" in line] == [3, 4]
    assert (lines[-1]["data/a"], lines[-1]["data/b"]) == (0.75, 0.25)
    assert lines[-1]["eta_seconds"] == 0.0 < lines[0]["eta_seconds"]
