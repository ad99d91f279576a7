"""The benchmark of a training step on a GPU: its arithmetic, its processes, its small form.

No speed is asserted: what the small form measures on a CPU says nothing.
"""

import json
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import pytest

from phi4.config import Recipe, check
from phi4.model.shape import training_flops_per_token
from tests.support.ranks import run_ranks
from tools import gpu_step_time, step_sides
from tools.gpu_step_time import FP32_TOLERANCE, disagreements
from tools.step_sides import OURS, OURS_FP8, SIDES, STOCK, STOCK_TE, recipe_of, why_absent
from tools.step_slice import CONDITIONS, Depth, compare, describe, slice_columns
from tools.step_time import host_batches
from tools.step_trace import ROWS, top_table

PHI4 = Recipe().model
STEP_TOKENS = 32_768
ROOT = Path(__file__).parents[2]


def sliced(lower: Depth, upper: Depth) -> dict:
    return slice_columns(lower, upper, PHI4, 4096, STEP_TOKENS)


def test_a_step_of_known_parts_gives_them_back_and_the_whole_model():
    # 130 ms and 7 GiB a layer, 210 ms and 17 GiB the rest.
    columns = sliced(Depth(2, [469.0, 470.0, 471.0], 31.0), Depth(4, [729.0, 730.0, 731.0], 45.0))
    part, whole = columns["slice"], columns["extrapolated"]
    assert (part["layer_ms"], part["rest_ms"]) == (130.0, 210.0)
    assert (part["layer_gib"], part["rest_gib"]) == (7.0, 17.0)
    # Medians 1 ms too low at one depth and 1 ms too high at the other are the widest.
    assert part["layer_ms_95"] == [129.0, 131.0] and part["rest_ms_95"] == [207.0, 213.0]
    rate = STEP_TOKENS / (0.210 + 40 * 0.130)
    assert whole["tokens_per_second_per_gpu"] == round(rate) == 6057
    low, high = whole["tokens_per_second_per_gpu_95"]
    assert low < 6057 < high
    flops = training_flops_per_token(PHI4, 4096)
    assert whole["mfu_causal"] == round(rate * flops.causal / 989.4e12, 4) == 0.5504
    assert whole["mfu_full"] == round(rate * flops.full / 989.4e12, 4) == 0.5812
    assert whole["peak_gib"] == 17 + 40 * 7
    assert whole["conditions"] == CONDITIONS and "without communication" in CONDITIONS


def test_a_spread_larger_than_a_layer_is_not_extrapolated():
    columns = sliced(Depth(2, [10.0, 30.0, 50.0], None), Depth(4, [20.0, 31.0, 60.0], None))
    assert columns["slice"]["layer_ms"] == 0.5
    assert columns["extrapolated"] is None
    assert columns["slice"]["layer_gib"] is None


def test_depths_in_the_wrong_order_are_refused():
    with pytest.raises(ValueError, match="depths 4 and 2"):
        sliced(Depth(4, [1.0], None), Depth(2, [1.0], None))


def _row(side: str, rate: float, layer_ms: float) -> dict:
    depths = (Depth(n, [layer_ms * (n + 1)] * 3, float(n)) for n in (2, 4))
    row = {"side": side, "tokens_per_second": rate, "num_layers": 2, "mfu": 0.5, "mfu_full": 0.6}
    return row | {"peak_gib": 2.0} | sliced(*depths)


def test_what_is_printed_says_under_which_conditions():
    text = describe(_row(OURS, 69_150, 10.0))
    assert "69,150 tokens/s at 2 layers, MFU 0.500 causal, 0.600 full, 2.0 GiB" in text
    assert "a layer 10.00 ms (10.00 to 10.00), the rest 10.00 ms" in text
    assert f"40 layers extrapolated, {CONDITIONS}" in text and "would take 40 GiB" in text
    assert describe({"side": "x", "absent": "no package"}) == "x: absent: no package"


@pytest.mark.parametrize(("layer_ms", "verdict"), [(11.1, "met"), (10.9, "not met")])
def test_the_goal_is_over_megatron_core_with_transformer_engine(layer_ms, verdict):
    rows = [_row(OURS, 110, 10.0), _row(STOCK_TE, 100, layer_ms), _row(STOCK, 50, layer_ms)]
    over_te, over_stock = compare(rows, OURS, [STOCK_TE, STOCK])
    assert over_te.startswith(f"{OURS} / {STOCK_TE}: 1.10x at 2 layers, {layer_ms / 10:.2f}x at 40")
    assert over_te.endswith(f"goal 1.10x: {verdict}") and CONDITIONS in over_te
    assert "2.20x at 2 layers" in over_stock and "goal" not in over_stock


def test_a_side_without_a_speed_leaves_the_goal_unchecked():
    rows = [_row(OURS, 110, 10.0), {"side": STOCK_TE, "absent": "not installed"}]
    assert "the goal of 1.10x is not checked" in compare(rows, OURS, [STOCK_TE])[0]
    assert "no comparison" in compare(rows[1:], OURS, [STOCK_TE])[0]


def test_a_side_that_cannot_run_here_says_why():
    te = SIDES[STOCK_TE]
    assert "needs a CUDA device" in why_absent(te, "cpu")
    with mock.patch.object(step_sides, "find_spec", lambda name: None):
        assert "transformer_engine is not installed" in why_absent(te, "cuda")
        assert "transformer-engine[pytorch]" in why_absent(te, "cuda")
    with mock.patch.object(step_sides, "find_spec", lambda name: name):
        assert why_absent(te, "cuda") is None


def test_the_side_in_fp8_is_the_same_step_in_fp8():
    bf16, fp8 = (recipe_of(SIDES[name], "cuda", 2) for name in (OURS, OURS_FP8))
    check(fp8)
    assert fp8.precision.fp8 == "te"
    assert fp8.model_copy(update={"precision": bf16.precision}) == bf16
    assert "needs a CUDA device" in why_absent(SIDES[OURS_FP8], "cpu")


def _waiting(script: str) -> subprocess.Popen:
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    return subprocess.Popen(["sh", "-c", f"read turn; {script}"], text=True, **pipes)


def test_what_ends_a_side_is_told():
    soon, late = time.monotonic() + 0.1, time.monotonic() + 600
    outcome = gpu_step_time._outcome
    assert outcome(_waiting("echo noise; echo '{\"turn\": \"'$turn'\"}'"), late, False) == {
        "turn": "go"
    }
    assert outcome(_waiting("exit 3"), late, False) == "failed: exit status 3"
    assert "took more than" in outcome(_waiting("exec sleep 600"), soon, False)
    unstarted = _waiting("exec sleep 600")
    assert "no time was left" in outcome(unstarted, time.monotonic() - 1, False)
    assert unstarted.poll() is not None
    assert "no time was left" in outcome(None, late, False)


def test_losses_of_other_arithmetic_are_found():
    def row(side: str, *losses: float) -> dict:
        return {"side": side, "losses": losses, "documents_per_row": 1}

    rows = [row("a", 12.5, 12.0), row("b", 12.52, 13.0), {"side": "c", "absent": "no package"}]
    assert not disagreements(rows, "cuda"), "bf16: the first losses, within 5e-3"
    [text] = disagreements([*rows, row("d", 12.6, 12.0)], "cuda")
    assert text.startswith("d: its losses differ")
    assert len(disagreements(rows, "cpu")) == 1
    assert disagreements([row("a", 1.0), row("b", float("nan"))], "cuda")


def test_table_of_a_trace_adds_up():
    times = [("gemm", 8, 600.0), ("norm", 4, 300.0)]
    times += [(f"small {i}", 1, 1.0) for i in range(100)]
    lines = top_table(times).splitlines()
    assert lines[1].split() == ["600.0", "60.0%", "8", "gemm"]
    assert lines[2].split() == ["300.0", "30.0%", "4", "norm"]
    assert lines[-2].split() == ["77.0", "7.7%", "77", "77", "others"]
    assert len(lines) == ROWS + 3, "a title, the others and the sum beside them"
    assert lines[-1].split() == ["1000.0", "100.0%", "all"]


def _losses_of_both(rank: int, world_size: int) -> tuple[dict[str, list[float]], dict]:
    found = {}
    for name in (OURS, STOCK):
        recipe = recipe_of(SIDES[name], "cpu", 2)
        step = SIDES[name].build(recipe, "cpu", SIDES[name])
        found[name] = [step(host_batches(recipe, 1, index)) for index in range(3)]
        settings = step.settings()
        step.close()
    return found, settings


def test_megatron_cores_own_step_computes_what_ours_does():
    [(found, settings)] = run_ranks(1, _losses_of_both)
    assert found[STOCK] == pytest.approx(found[OURS], rel=FP32_TOLERANCE, abs=0)
    assert len(set(found[STOCK])) == 3
    assert settings["adam"] == "torch.optim.adamw.AdamW", "megatron-core's own choice, not ours"


@pytest.mark.slow
def test_small_form_runs_all_of_it_and_records_what_is_absent(tmp_path):
    names = [OURS, STOCK_TE, STOCK, "transformers", "triton, csrc, 16 documents a row"]
    out = tmp_path / "rows.jsonl"
    command = [sys.executable, "-m", "tools.gpu_step_time", "--tiny", "--out", str(out)]
    command += ["--trace", str(tmp_path / "trace"), *(x for n in names for x in ("--side", n))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = {row["side"]: row for row in map(json.loads, out.read_text().splitlines())}
    assert list(rows) == names and len({row["run"] for row in rows.values()}) == 1
    assert "needs a CUDA device" in rows[STOCK_TE]["absent"]
    assert rows[STOCK]["slice"]["num_layers"] == [2, 4]
    assert "slice" not in rows[names[-1]] and rows[names[-1]]["documents_per_row"] == 16
    assert "the goal of 1.10x is not checked" in done.stdout
    for name in ("triton_csrc_optimizer", "megatron_core", "transformers"):
        trace = json.loads((tmp_path / "trace" / f"{name}.json").read_text())
        assert any(event.get("name") == "aten::mm" for event in trace["traceEvents"])
        assert "aten::mm" in (tmp_path / "trace" / f"{name}.txt").read_text()
