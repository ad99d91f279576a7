"""README's measured facts are what the committed rows say."""

import json
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from tools import fault_table
from tools.measured_table import README, ROOT, at_most, table, with_table


def test_readme_says_what_the_rows_say() -> None:
    text = README.read_text()
    assert with_table(text, ROOT / "benchmarks") == text, "run: make measured"


def test_page_of_faults_says_what_the_rows_say() -> None:
    rows = fault_table.newest_rows()
    assert [row["fault"] for row in rows] == list(fault_table.FAULTS)
    page = fault_table.PAGE.read_text(encoding="utf-8")
    assert fault_table.page_with(rows) == page, "run: python -m tools.fault_table --docs"


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
