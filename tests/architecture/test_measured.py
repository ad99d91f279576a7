"""README's measured facts are what the committed rows say."""

from tools.measured_table import README, ROOT, with_table


def test_readme_says_what_the_rows_say() -> None:
    text = README.read_text()
    assert with_table(text, ROOT / "benchmarks") == text, "run: make measured"
