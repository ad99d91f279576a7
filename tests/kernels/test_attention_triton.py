"""Attention in Triton under the interpreter: tiles, bounds, any ranges, addresses, graphs."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from phi4_kernels.testing.interpreted import InterpretedProcess

CHECKS = "tests.kernels.attention_checks"
LENGTHS = st.sampled_from((0, 1, 1, 2, 3, 7, 8, 9, 16, 27))


@st.composite
def drawn_ranges(draw: st.DrawFn, lengths: st.SearchStrategy[int] = LENGTHS) -> tuple[list, list]:
    """Host boundaries [offsets, starts, ends] with gaps, and (queries, keys), one or more each."""
    offsets, starts, ends = [draw(st.integers(0, 3))], [], []
    for _ in range(draw(st.integers(0, 7))):
        offsets.append(offsets[-1] + draw(lengths))
        starts.append((ends[-1] if ends else 0) + draw(st.sampled_from((0, 0, 0, 2))))
        ends.append(starts[-1] + draw(lengths))
    outside = draw(st.integers(1, 2))
    return [offsets, starts, ends], [offsets[-1] + outside, (ends or [0])[-1] + outside]


@settings(max_examples=30, deadline=None)
@given(drawn=drawn_ranges(), causal=st.booleans(), of_keys=st.booleans())
def test_tiles_cover_all_tokens_and_bounds_are_the_mask(
    interpreted: InterpretedProcess, drawn: tuple, causal: bool, of_keys: bool
) -> None:
    where, sizes = drawn
    found = {"where": where, "sizes": sizes, "causal": causal, "of_keys": of_keys}
    interpreted.call(f"{CHECKS}:tiles_partition_and_bound", rows=8, **found)


def test_a_thousand_documents_of_one_token_share_tiles(interpreted: InterpretedProcess) -> None:
    offsets = list(range(1025))
    found = {"where": [offsets, offsets[:-1], offsets[1:]], "sizes": [1024, 1024]}
    count = interpreted.call(
        f"{CHECKS}:tiles_partition_and_bound", rows=128, causal=True, of_keys=False, **found
    )
    assert count == 8


@settings(max_examples=6, deadline=None)
@given(
    drawn=drawn_ranges(st.sampled_from((0, 1, 1, 2, 3, 20, 33))),
    heads=st.sampled_from(([1, 1], [2, 2], [4, 1], [6, 2])),
    causal=st.booleans(),
)
def test_any_ranges_equal_the_definition(
    interpreted: InterpretedProcess, drawn: tuple, heads: list[int], causal: bool
) -> None:
    where, sizes = drawn
    found = {"where": where, "sizes": sizes, "heads": heads, "causal": causal}
    interpreted.call(f"{CHECKS}:equals_the_definition", **found)


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float32", marks=pytest.mark.slow)])
def test_long_documents_never_meet(interpreted: InterpretedProcess, dtype: str) -> None:
    interpreted.call(f"{CHECKS}:long_documents_never_meet", dtype=dtype)


def test_what_is_not_finite_stays_in_its_document(interpreted: InterpretedProcess) -> None:
    check = f"{CHECKS}:what_is_not_finite_stays_in_its_document"
    interpreted.call(check, implementation="triton")


@pytest.mark.parametrize(
    "check",
    [
        "decoding_does_not_depend_on_the_batch",
        "a_key_that_is_not_finite_reaches_only_queries_that_see_it",
    ],
)
def test_decoding(interpreted: InterpretedProcess, check: str) -> None:
    interpreted.call(f"{CHECKS}:{check}")


def test_queries_are_read_by_group(interpreted: InterpretedProcess) -> None:
    interpreted.call(f"{CHECKS}:queries_are_read_by_group")


def test_far_rows_are_addressed_in_64_bits(interpreted: InterpretedProcess) -> None:
    interpreted.call(f"{CHECKS}:far_rows_are_addressed_in_64_bits")


@pytest.mark.parametrize("implementation", ["torch", "triton"])
def test_one_graph_holds_attention(interpreted: InterpretedProcess, implementation: str) -> None:
    interpreted.call(f"{CHECKS}:one_graph_holds_attention", implementation=implementation)
