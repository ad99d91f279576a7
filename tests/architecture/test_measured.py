"""README's measured facts are what the committed rows say."""

import json
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from tools import benchmark_page, fault_table
from tools.measured_table import README, ROOT, at_most, table, with_table


def test_readme_says_what_the_rows_say() -> None:
    text = README.read_text()
    assert with_table(text, ROOT / "benchmarks") == text, "run: make measured"


def test_page_of_faults_says_what_the_rows_say() -> None:
    rows = fault_table.newest_rows()
    assert [row["fault"] for row in rows] == list(fault_table.FAULTS)
    page = fault_table.PAGE.read_text(encoding="utf-8")
    assert fault_table.page_with(rows) == page, "run: python -m tools.fault_table --docs"


def test_page_of_benchmarks_says_what_the_rows_say() -> None:
    page = benchmark_page.PAGE.read_text(encoding="utf-8")
    assert page == benchmark_page.page(ROOT / "benchmarks"), "run: make measured"


def test_every_file_of_rows_is_on_the_page_of_benchmarks() -> None:
    files = sorted(path.name for path in (ROOT / "benchmarks").glob("*.jsonl"))
    assert benchmark_page.files() == files, "a section per file: tools/benchmark_sections.py"


def test_the_page_of_benchmarks_shows_the_newest_row_of_each_case_passed_or_not(
    tmp_path: Path,
) -> None:
    def row(case: str, error: float, passed: bool, commit: str) -> str:
        columns = {"case": case, "device": "GPU", "losses": [1.0, 2.0], "tolerance": 0.1}
        columns |= {"largest_relative_error": error, "passed": passed, "commit": commit}
        return json.dumps(columns)

    lines = [row("a", 0.01, True, "old"), row("b", 0.02, True, "b"), row("a", 0.3, False, "new")]
    (tmp_path / "gpu_engine.jsonl").write_text("\n".join(lines))
    page = benchmark_page.page(tmp_path)
    assert "| a | 2 | 3.0e-01 | 0.1 | **no** | GPU | new |" in page and "| old |" not in page
    assert "| b | 2 | 2.0e-02 | 0.1 | yes | GPU | b |" in page
    assert "gpu_step_time" not in page, "no rows, no section"


@given(st.floats(1e-12, 1e3))
def test_a_bound_is_not_under_what_it_bounds(number: float) -> None:
    assert number <= float(at_most(number)) <= 1.1 * number


def test_speeds_on_a_gpu_are_compared_within_one_run(tmp_path: Path) -> None:
    def row(side: str, rate: int, commit: str) -> str:
        shape = {"device": "GPU", "num_layers": 2, "row_tokens": 4096, "peak_gib": 1.0, "mfu": 0.5}
        return json.dumps({"side": side, "tokens_per_second": rate, "commit": commit, **shape})

    whole = [("triton, csrc optimizer", 300), ("plain torch", 200), ("transformers + liger", 100)]
    lines = [row(side, rate, "first") for side, rate in whole]
    # The second run ended before its third side: it is not filled up from the first one.
    lines += [row(side, 10 * rate, "second") for side, rate in whole[:2]]
    (tmp_path / "gpu_step_time.jsonl").write_text("\n".join(lines))
    assert "1.50 x the same engine" in table(tmp_path) and "3.00 x transformers" in table(tmp_path)
    assert "| first |" in table(tmp_path)


def test_rows_of_a_named_run_give_the_whole_model_and_leave_out_what_is_absent(
    tmp_path: Path,
) -> None:
    def row(side: str, rate: int, run: str, **more: object) -> str:
        shape = {"device": "GPU", "num_layers": 2, "row_tokens": 4096, "peak_gib": 1.0, "mfu": 0.5}
        columns = {"side": side, "tokens_per_second": rate, "commit": run, "run": run}
        return json.dumps(columns | shape | more)

    whole = {
        "conditions": "without communication",
        "num_layers": 40,
        "tokens_per_second_per_gpu": 6100,
        "tokens_per_second_per_gpu_95": [6090, 6110],
        "mfu_causal": 0.55,
        "mfu_full": 0.58,
    }
    more = {"slice": {"num_layers": [2, 4]}, "extrapolated": whole}
    absent = {"side": "megatron-core + TE", "commit": "one", "run": "one", "absent": "no package"}
    lines = [
        row("triton, csrc optimizer", 300, "one", **more),
        json.dumps(absent),
        row("megatron-core", 150, "one"),
        row("plain torch", 200, "one"),
        row("transformers + liger", 100, "one"),
        # Some sides of a later run, ours not among them, are none of the run before.
        row("plain torch", 1, "two"),
    ]
    (tmp_path / "gpu_step_time.jsonl").write_text("\n".join(lines))
    text = table(tmp_path)
    assert "2.00 x megatron-core (150" in text and "1.50 x the same engine" in text
    assert "Transformer Engine" not in text
    assert "40 layers extrapolated from 2 and 4, without communication: 6,100 tokens/s" in text
    assert "MFU 0.550 causal, 0.580 full" in text
