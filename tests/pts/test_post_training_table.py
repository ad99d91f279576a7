"""docs/dpo.md and README say what the committed rows say, and pool seeds by the rule of errors."""

import math

import pytest

from tools.post_training_table import PAGE, newest_runs, page_table, pooled, read_rows, readme_line


def estimate(mean: float, error: float = 0.01) -> dict:
    return {"mean": mean, "standard_error": error, "num_questions": 400}


def rows_of(seed: int, first: float, task: str = "short") -> list[dict]:
    common = {"task": task, "seed": seed, "commit": "abc"}
    names = ("base", "SFT", "DPO 1", "DPO 2 only", "DPO 1 + 2")
    stages = {name: {"sampled": estimate(first + i / 10)} for i, name in enumerate(names)}
    gains = {name: estimate(0.1) for name in ("SFT", "DPO 1", "DPO 1 + 2")}
    whole = {"pairs": 7, "sampled": estimate(0.5), "pivots_over_it": estimate(-0.02)}
    return [
        {**common, "measured": "chain", "stages": stages, "gains": gains},
        {**common, "measured": "full_pairs_equal_pairs", **whole},
    ]


def test_page_says_what_the_rows_say() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert page_table(read_rows()) in text, "run: python -m tools.post_training_table"


def test_seeds_are_pooled() -> None:
    mean, error = pooled([estimate(0.4, 0.03), estimate(0.6, 0.04)])
    assert mean == pytest.approx(0.5) and error == pytest.approx(0.025)
    line = readme_line(rows_of(1, 0.4) + rows_of(2, 0.5) + rows_of(3, 0.1, "long"))
    assert line is not None
    assert "base 0.450" in line[1] and "2 seeds of 400" in line[1]
    least = 0.1 / (0.01 / math.sqrt(2))
    assert f"{math.floor(10 * least) / 10} standard errors" in line[1]


def test_newer_rows_of_a_seed_replace_older_ones() -> None:
    rows = rows_of(1, 0.4) + rows_of(1, 0.5) + rows_of(2, 0.3, "long")
    runs = newest_runs(rows)
    assert [run["chain"]["task"] for run in runs] == ["short", "long"]
    assert runs[0]["chain"]["stages"]["base"]["sampled"]["mean"] == 0.5
    table = page_table(rows)
    assert "| 12 tokens | 1 | 0.500 ± 0.010" in table and "0.500 ± 0.010 (7)" in table
    assert "as many pairs: -0.020 ± 0.010" in table


def test_no_row_is_no_line() -> None:
    assert readme_line([]) is None and newest_runs([]) == []
