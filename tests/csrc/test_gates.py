"""The lab's gates on the CUDA ops: error rule, guard bands, equal bits; here in the host form."""

import json
from pathlib import Path

import pytest
import torch
from phi4_kernels import cuda_library, dispatch, registry
from phi4_kernels.adamw.cases import with_fused_adam
from phi4_kernels.adamw.optimizer import FusedAdam
from phi4_kernels.bench import measure, report
from phi4_kernels.errors import ImplementationError
from phi4_kernels.testing import __main__ as command
from phi4_kernels.testing import error_rule, evidence_rows, gates, numerics
from typer.testing import CliRunner

from phi4.cli.kernels import app

CHECKS = [check for entry in registry.entries("cuda").values() for check in gates.names(entry)]
MACHINE = {"device": "H200", "capability": "9.0", "commit": "abc", "date": "2026-01-01"}


@pytest.mark.parametrize(("entry", "case", "dtype"), CHECKS)
def test_host_forms_obey_the_error_rule(loaded: Path, entry: str, case: str, dtype: str) -> None:
    gates.check_numbers(entry, case, dtype, "cuda", "cpu")


@pytest.mark.parametrize(("entry", "case", "dtype"), [c for c in CHECKS if c[1] in ("cut", "many")])
def test_torch_forms_obey_it_too(entry: str, case: str, dtype: str) -> None:
    gates.check_numbers(entry, case, dtype, "torch", "cpu")


def test_another_fused_adam_takes_the_whole_step() -> None:
    """What the bench runs of apex and transformer-engine, with ours in their place."""
    entry = registry.entries("cuda")["optimizer_step"]
    inputs = entry.make(entry.proof_cases[0], torch.float32)
    eager = numerics.evaluate(entry.reference, inputs, None)
    truth = numerics.evaluate(entry.reference, numerics.converted(inputs, numerics.doubled), None)
    found = numerics.evaluate(with_fused_adam(FusedAdam), inputs, None)
    for name, exact in truth.items():
        error_rule.check(name, found[name], eager[name], exact)


@pytest.mark.parametrize(
    ("entry", "per_parameter"), [("adamw", 30), ("adamw_fp8", 31), ("optimizer_step", 34)]
)
def test_bytes_per_parameter(entry: str, per_parameter: int) -> None:
    found = registry.entries("cuda")[entry]
    (case,) = found.bench_cases
    cost = found.cost(case, torch.float32)["forward"]
    size = case.sizes["rows"] * case.sizes["width"]
    assert cost.bytes == per_parameter * size
    assert eval(cost.formula.replace(" B", ""), {"N": size}) == cost.bytes


def test_cast_and_transpose_moves_four_bytes() -> None:
    entry = registry.entries("cuda")["fp8_cast_transpose"]
    floors = [entry.cost(case, torch.bfloat16)["forward"] for case in entry.bench_cases]
    assert floors[0].bytes == 4 * 16384 * 5120
    assert round(floors[0].bytes / 4.3e12 * 1e6) == 78


def test_floors_list_the_cuda_ops() -> None:
    page = report.floors("adamw")
    assert "optimizer_step" in page and "N * (26 + 2 * 4) B" in page and "swiglu" not in page
    tasks = measure.passes(registry.entries("cuda")["optimizer_step"], torch.bfloat16)
    assert [task.dtype for task in tasks] == [torch.float32]


@pytest.fixture
def on_h200(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> torch.device:
    """No rows, and a pretended GPU of capability 9.0."""
    monkeypatch.setattr(dispatch, "CORRECTNESS_ROWS", tmp_path / "correctness.jsonl")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "H200")
    monkeypatch.setattr(evidence_rows, "machine", lambda: MACHINE)
    dispatch.choose.cache_clear()
    yield torch.device("cuda", 0)
    dispatch.choose.cache_clear()


def _record(**result: object) -> None:
    found = {"num_checks": 3, "worst_margin": 0.5, "red": {}} | result
    evidence_rows.append(
        dispatch.CORRECTNESS_ROWS, evidence_rows.correctness("adamw", "cuda", found)
    )


def _status_of(op: str) -> dict[str, str]:
    rows = {(row["op"], row["implementation"]): row for row in dispatch.status()}
    return rows[op, "cuda"]


def test_auto_takes_what_a_row_proves(loaded: Path, on_h200: torch.device) -> None:
    assert _status_of("adamw")["state"] == "experimental: never executed on a GPU"
    _record()
    assert dispatch.choose("adamw", "auto", on_h200).describe() == (
        "adamw: cuda (auto: proven on 9.0, commit abc)"
    )
    assert dispatch.choose("grad_norm", "auto", on_h200).implementation == "torch"
    found = _status_of("adamw")
    assert (found["state"], found["device"], found["commit"]) == ("proven", "H200", "abc")


@pytest.mark.parametrize(
    ("change", "state"),
    [
        ({"green": False}, "experimental: last row is red"),
        ({"source": "0" * 16}, "experimental: changed since its last row"),
    ],
)
def test_auto_leaves_what_no_row_proves(
    loaded: Path, on_h200: torch.device, change: dict, state: str
) -> None:
    _record()
    row = json.loads(dispatch.CORRECTNESS_ROWS.read_text())
    dispatch.CORRECTNESS_ROWS.unlink()
    evidence_rows.append(dispatch.CORRECTNESS_ROWS, row | change)
    assert dispatch.choose("adamw", "auto", on_h200).implementation == "torch"
    assert _status_of("adamw")["state"] == state


def test_phi4_kernels_status_lists_them(on_h200: torch.device) -> None:
    _record()
    shown = CliRunner().invoke(app, ["status"]).output
    (line,) = (line for line in shown.splitlines() if "adamw" in line and "cuda" in line)
    assert all(part in line for part in ("H200", "abc", "2026-01-01"))
    assert all(op in shown for op in registry.OPS)


def test_a_red_check_is_a_red_row(loaded: Path, on_h200: torch.device) -> None:
    _record(red={"adamw/cut/fp32": "GateError"})
    assert json.loads(dispatch.CORRECTNESS_ROWS.read_text())["green"] is False


def test_the_command_runs_the_cuda_ops(
    loaded: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = command._parse(["numbers", "--op", "grad_norm"])
    assert command._numbers(options) == 0
    assert "grad_norm cuda: green, 8 checks" in capsys.readouterr().out
    monkeypatch.setattr(cuda_library, "missing", lambda: "csrc is not built")
    assert command._numbers(options) == 0
    assert "grad_norm cuda: not run: csrc is not built" in capsys.readouterr().out


def test_entries_name_what_runs_where_the_library_is_missing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(cuda_library, "BUILDS", tmp_path)
    for cached in (cuda_library.load, dispatch.choose):
        cached.cache_clear()
    with pytest.raises(ImplementationError, match="csrc is not built"):
        gates.check_numbers("adamw", "cut", "fp32", "cuda", "cpu")
    for cached in (cuda_library.load, dispatch.choose):
        cached.cache_clear()
