"""README's measured facts are what the committed rows say."""

from hypothesis import given
from hypothesis import strategies as st

from tools.measured_table import README, ROOT, at_most, with_table


def test_readme_says_what_the_rows_say() -> None:
    text = README.read_text()
    assert with_table(text, ROOT / "benchmarks") == text, "run: make measured"


@given(st.floats(1e-12, 1e3))
def test_a_bound_is_not_under_what_it_bounds(number: float) -> None:
    assert number <= float(at_most(number)) <= 1.1 * number
