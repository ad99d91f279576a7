"""The bench's arithmetic and its pages, which need no GPU, and its silence without one."""

import json
from pathlib import Path

import pytest
import torch
from phi4_kernels import dispatch, registry
from phi4_kernels.bench import ceilings, command, measure, report, timing
from phi4_kernels.bench.providers import TABLE, attention, function
from phi4_kernels.errors import GateError, KernelError, UnavailableError

RATES = ceilings.Ceilings(4e12, 800e12)
BENCHED = [
    task for e in registry.entries("triton").values() for task in measure.passes(e, torch.bfloat16)
]
MACHINE = {"device": "H200", "driver": "580", "torch": "2.11", "triton": "3.6", "commit": "abc"}


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure.evidence_rows, "machine", lambda: MACHINE)


@pytest.mark.parametrize(
    ("op", "mode", "case", "floor_us"),
    [
        ("rms_norm", "forward", "t16384-w5120", 78.0),
        ("rms_norm", "backward", "t16384-w5120", 117.1),
        ("add_rms_norm", "forward", "t16384-w5120", 156.1),
        ("add_rms_norm", "backward", "t16384-w5120", 156.1),
        ("rope_qkv", "forward", "t16384-grouped-ids", 99.5),
        ("swiglu", "forward", "t16384-w17920", 409.7),
        ("swiglu", "backward", "t16384-w17920", 682.8),
        ("swiglu_backward", "forward", "t16384-w17920", 819.4),
        ("rms_norm_fp8_columnwise", "forward", "t16384-w5120", 78.0),
    ],
)
def test_floors_are_the_published_arithmetic(
    op: str, mode: str, case: str, floor_us: float
) -> None:
    task = next(t for t in BENCHED if (t.entry.name, t.mode, t.case.name) == (op, mode, case))
    rates = ceilings.NOMINAL
    floor = task.cost.floor_seconds(rates.bytes_per_second, rates.flops_per_second)
    assert round(floor * 1e6, 1) == floor_us


@pytest.mark.parametrize("task", BENCHED, ids=lambda t: f"{t.entry.name}-{t.mode}-{t.case.name}")
def test_the_byte_formula_is_the_byte_count(task: measure.Pass) -> None:
    sizes = task.case.sizes
    names = {"T": sizes.get("rows", sizes.get("tokens"))}
    names |= {"H": sizes.get("hidden"), "F": sizes.get("width")}
    assert eval(task.cost.formula.replace(" B", ""), names) == task.cost.bytes


def test_a_time_under_the_floor_is_an_error() -> None:
    task = BENCHED[0]
    floor = task.cost.floor_seconds(RATES.bytes_per_second, RATES.flops_per_second)
    variant = measure.Variant("triton", print, True)
    row = measure._row(task, variant, [floor] * 5, floor, RATES)
    assert row["percent_of_floor"] == 100.0
    with pytest.raises(GateError, match="timing or the byte formula"):
        measure._row(task, variant, [floor / 2] * 5, floor, RATES)


@pytest.mark.parametrize(
    ("moved", "multiplied", "rate"),
    [(4 * 10**8, 0, "4.00 TB/s"), (4 * 10**8, 6 * 10**10, "600 TFLOP/s")],
)
def test_the_rate_is_of_what_sets_the_floor(moved: int, multiplied: int, rate: str) -> None:
    row = {"bytes": moved, "flops": multiplied, "p50_us": 100.0}
    row |= {"copy_bytes_per_second": 4e12 * 2, "matmul_flops_per_second": 800e12}
    assert report.useful_rate(row) == rate


def test_attention_counts_half_of_the_square_as_its_peers_do() -> None:
    (task,) = (
        t
        for t in BENCHED
        if (t.entry.name, t.mode, t.case.name) == ("attention", "forward", "t4096")
    )
    assert task.cost.flops == 2 * 2 * 4096**2 // 2 * 40 * 128


def test_torch_is_the_best_of_eager_and_compile() -> None:
    measured = [
        {"provider": "triton", "p50_us": 1.0},
        {"provider": "torch", "p50_us": 3.0},
        {"provider": "compile", "p50_us": 2.0},
    ]
    assert measure.best_of_torch(measured) == [
        {"provider": "triton", "p50_us": 1.0},
        {"provider": "torch", "p50_us": 2.0, "way": "compile"},
        {"provider": "torch-eager", "p50_us": 3.0},
    ]


def test_percentiles_are_samples() -> None:
    times = [float(n) for n in range(100, 0, -1)]
    assert [timing.percentile(times, q) for q in (0, 20, 50, 80, 100)] == [1, 21, 51, 81, 100]


def test_the_page_and_the_picture_come_from_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task, variant = BENCHED[0], measure.Variant("triton", print, False)
    floor = task.cost.floor_seconds(RATES.bytes_per_second, RATES.flops_per_second)
    row = measure._row(task, variant, [2 * floor] * 3, floor, RATES) | MACHINE
    row |= {"host_us": 9.0, "saved_bytes": 10**6, "peak_bytes": 0}
    older = row | {"p50_us": 777.7}
    (tmp_path / "rows.jsonl").write_text(json.dumps(older) + "\n" + json.dumps(row) + "\n")
    monkeypatch.setattr(report, "ROWS", tmp_path / "rows.jsonl")
    monkeypatch.setattr(report, "FLOORS", tmp_path / "FLOORS.md")
    monkeypatch.setattr(report, "PICTURE", tmp_path / "roofline.png")
    assert report.load() == [older, row]
    report.write()
    page = report.measured(report.load())
    assert "fails the error rule" in page and "50%" in page and "777.7" not in page
    assert report.PICTURE.read_bytes().startswith(b"\x89PNG")


def test_page_names_the_programs_that_changed_since_their_check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [
        {"op": "rope", "implementation": "triton", "source": "older"},
        {"op": "swiglu", "implementation": "triton", "source": "older"},
        {
            "op": "swiglu",
            "implementation": "triton",
            "source": registry.source_digest("swiglu", "triton"),
        },
    ]
    monkeypatch.setattr(dispatch, "CORRECTNESS_ROWS", tmp_path / "correctness.jsonl")
    dispatch.CORRECTNESS_ROWS.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "last checked on a GPU: rope (triton). " in report.changed_since()
    dispatch.CORRECTNESS_ROWS.write_text(json.dumps(rows[-1]) + "\n")
    assert "changed" not in report.changed_since()


def test_the_committed_floors_are_those_of_the_cases() -> None:
    assert report.floors_page() == report.FLOORS.read_text(), "run: make bench ARGS=--report"


def test_without_a_gpu_nothing_is_timed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[list[str]] = []

    class Done:
        returncode = 0

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(command.subprocess, "run", lambda line: commands.append(line) or Done())
    assert command.main(["--op", "rope"]) == 0
    printed = capsys.readouterr().out
    assert "nothing was timed" in printed and "rope_qkv" in printed and "swiglu" not in printed
    assert commands[0][-2:] == ["--op", "rope"]


def test_unknown_providers_are_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert command.main(["--against", "torch,rival"]) == 2
    assert "rival: not known" in capsys.readouterr().err


def test_an_absent_provider_says_why() -> None:
    entry = registry.entries()["rms_norm"]
    with pytest.raises(UnavailableError, match="cudnn has no rms_norm"):
        function("cudnn", entry)
    assert function("torch", entry)(torch.ones(2, 4), torch.ones(4), 1e-5).shape == (2, 4)


def test_a_provider_that_is_not_installed_is_named() -> None:
    entry = registry.entries()["optimizer_step"]
    with pytest.raises(UnavailableError, match=r"apex: No module named 'apex'.*install it"):
        function("apex", entry)
    with pytest.raises(UnavailableError, match=r"compile has no attention: .* 43 GB"):
        function("compile", registry.entries()["attention"])


def test_the_table_names_only_entries_that_exist() -> None:
    assert {name for makers in TABLE.values() for name in makers} <= registry.entries().keys()


def test_attention_by_document_is_the_entry_s_function_and_refuses_the_rest() -> None:
    entry = registry.entries()["attention"]
    documents = next(case for case in entry.proof_cases if case.name == "phi4-documents")
    ranges = next(case for case in entry.proof_cases if case.name == "ranges")
    inputs = entry.make(documents, torch.float32)
    run = attention._by_document(torch.nn.attention.SDPBackend.MATH)
    expected = entry.reference(**inputs.tensors, **inputs.constants)
    torch.testing.assert_close(run(**inputs.tensors, **inputs.constants), expected)
    with pytest.raises(TypeError, match="window"):
        run(**inputs.tensors, **inputs.constants, window=64)
    inputs = entry.make(ranges, torch.float32)
    with pytest.raises(KernelError, match="expected packed documents"):
        run(**inputs.tensors, **inputs.constants)
