"""`phi4 plan` prints the table and ends with 2 and one line where a recipe does not fit."""

from pathlib import Path

import pytest

from phi4.cli import main

RECIPES = Path(__file__).parents[2] / "examples" / "recipes"


def run(
    capsys: pytest.CaptureFixture[str], *arguments: str, recipe: str = "phi4_14b_pretrain"
) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main(["plan", str(RECIPES / f"{recipe}.toml"), *arguments])
    captured = capsys.readouterr()
    return ended.value.code, captured.out, captured.err


def test_it_prints_what_was_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "--gpus", "1920", "--gpu", "h100")
    assert (code, err) == (0, "")
    for figure in (
        "14,659,507,200",
        "23,592,960 = 5,760 rows x 4,096; 12 micro-batches of 1 per data rank",
        "423,855, 9,999,994,060,800 tokens",
        "3,835,381,760",
        "342.9 GiB gathered per machine; auto takes full from 1.3 TiB on, so full on 2.0 TiB",
        "context 1, data 480",
        "not measured",
    ):
        assert figure in out
    assert "…" not in out


def test_fp8_is_named_and_costs_its_casts(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "--gpus", "1920", "precision.fp8=torch")
    assert (code, err) == (0, "")
    assert "bf16, layers 2 to 39 of 40 in FP8 (torch, tensorwise)" in out
    code, _, err = run(capsys, "--gpus", "64", "--gpu", "a100", "precision.fp8=torch")
    [line] = err.strip().splitlines()
    assert code == 2 and "A100 SXM 80 GB: precision.fp8=torch on a GPU of compute" in line
    assert "FP8" not in run(capsys, "--gpus", "1920")[1]


def test_gather_in_fp8_is_estimated(capsys: pytest.CaptureFixture[str]) -> None:
    keys = ("precision.fp8=torch", "parallel.fp8_param_gather=true")
    code, out, err = run(capsys, "--gpus", "1920", *keys)
    assert (code, err) == (0, "")
    assert "4.0 GiB received per step on the largest stage, 7.1 GiB without; messages" in out
    assert "FP8 weight gather" not in run(capsys, "--gpus", "1920", keys[0])[1]


@pytest.mark.parametrize("recipe", ["phi4_14b_dpo_pivotal", "phi4_14b_dpo_judge"])
def test_no_reference_model_is_held(capsys: pytest.CaptureFixture[str], recipe: str) -> None:
    code, out, err = run(capsys, "--gpus", "64", "--gpu", "h100", recipe=recipe)
    _, sft, _ = run(capsys, "--gpus", "64", "--gpu", "h100", recipe="phi4_14b_sft")
    assert (code, err) == (0, "")
    assert "two sequences of one row" in out and "0 B: its log-probabilities are cached" in out
    # The same bytes on the largest stage as for fine-tuning with one model.
    stage = next(line for line in out.splitlines() if line.split()[:1] == ["0"])
    assert stage in sft and "reference model" not in sft


def test_small_machine_saves_without_gathering(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = run(capsys, "--gpus", "64", "--host-memory", "512")
    assert "so dp, full every 5,000 steps on 512.0 GiB" in out


def test_mistake_is_one_line_and_no_refusal(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "--gpus", "64", "recompute.granularity=selective")
    assert (code, err) == (0, "")
    (line,) = (line for line in out.splitlines() if line.startswith("mistake: "))
    assert line.endswith("use recompute.granularity=none")
    assert "mistake" not in run(capsys, "--gpus", "64")[1]


def test_refusal_is_one_line_after_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "batch.micro_batch_size=4")
    assert code == 2
    assert "GiB per GPU at the peak, on 8 x H100" in out
    assert err.startswith("LayoutError: stage 0 of 2 needs")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    "arguments", [("--gpus", "6"), ("--gpu", "tpu"), ("parallel.tensor=4",), ("x=1",)]
)
def test_wrong_input_is_one_line(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...]
) -> None:
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, "")
    assert "Traceback" not in err
