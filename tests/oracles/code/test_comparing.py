"""Equal values are equal, and nothing else is."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phi4.oracles.code.comparing import read_json, same_output, same_value

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=10,
)


@given(JSON)
def test_value_is_equal_to_itself(value: object) -> None:
    assert same_value(json.loads(json.dumps(value)), value, None)


@given(JSON, JSON)
def test_equality_has_no_sides(one: object, other: object) -> None:
    assert same_value(one, other, None) == same_value(other, one, None)
    assert not same_value([one], one, None)


@pytest.mark.parametrize(
    ("got", "expected"),
    [(1, True), (0, False), (None, False), ("1", 1), ([], {}), ([1], [1, 1]), ({"a": 1}, {"b": 1})],
)
def test_values_of_other_kinds_differ(got: object, expected: object) -> None:
    assert not same_value(got, expected, 1.0)
    assert not same_value(expected, got, 1.0)


def test_tolerance_is_absolute_or_relative_and_for_numbers_alone() -> None:
    assert same_value([1e9 + 1], [1e9], 1e-6)
    assert same_value(1e-7, 0, 1e-6)
    assert not same_value(1.1, 1.0, 1e-6)
    assert not same_value("1.0", "1.00", 1e-6)
    assert not same_value(10**400, 1.0, 0.5)


def test_output_ignores_space_at_the_ends_of_lines() -> None:
    assert same_output(b"a \r\nb\n\n", "a\nb", None)
    assert not same_output(b" a", "a", None)
    assert not same_output(b"a\n\nb", "a\nb", None)
    assert same_output(b"1.0000001 x", "1  x", 1e-6)
    assert not same_output(b"1 y", "1 x", 1e-6)
    assert not same_output(b"1 x z", "1 x", 1e-6)


@pytest.mark.parametrize("text", [b"NaN", b"Infinity", b"[" * 100_000, b"1" * 5000, b"{", b"\xff"])
def test_what_is_no_value_is_refused(text: bytes) -> None:
    with pytest.raises(ValueError):
        read_json(text)
