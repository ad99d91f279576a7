import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from phi4.data.stream.drawn_tokens import drawn_tokens
from phi4.data.stream.ledger import BlendEntry, Ledger, SourceCount, parse_state
from phi4.errors import DataError

SIZES = {"code": 7, "prose": 5, "web": 11}


def ledger(weights: dict[str, float], state: dict | None = None, **changes) -> Ledger:
    sizes = {name: SourceCount(SIZES[name]) for name in weights}
    run = {"seed": 1, "unit_tokens": 4, **changes}
    return Ledger(sizes, BlendEntry(weights=weights, drawn={}), state=state, **run)


def drawn(book: Ledger, num_units: int) -> list[tuple[str, int]]:
    draws = book.draw(num_units)
    book.count(draws)
    pairs = zip(draws.source.tolist(), draws.ordinal.tolist(), strict=True)
    return [(book.names[source], ordinal) for source, ordinal in pairs]


@given(
    blends=st.lists(
        st.dictionaries(
            st.sampled_from(sorted(SIZES)), st.sampled_from([0.1, 0.3, 1.0]), min_size=1
        ),
        min_size=1,
        max_size=5,
    ),
    lengths=st.lists(st.integers(0, 40), min_size=5, max_size=5),
)
def test_sources_count_on_through_every_change_of_the_blend(
    blends: list[dict[str, float]], lengths: list[int]
) -> None:
    state, draws = None, []
    for weights, length in zip(blends, lengths, strict=False):
        book = ledger(weights, state)
        since = drawn(book, length)
        asked = {name: weight / sum(weights.values()) for name, weight in weights.items()}
        last = state is not None and state["blends"][-1]["weights"]
        if last != weights:
            for prefix in range(1, length + 1):
                for name, fraction in asked.items():
                    count = sum(source == name for source, _ in since[:prefix])
                    assert abs(count - fraction * prefix) < 1
        draws += since
        state = json.loads(json.dumps(book.state()))
    for name in SIZES:
        ordinals = [ordinal for source, ordinal in draws if source == name]
        assert ordinals == list(range(len(ordinals)))


def test_resumed_ledger_goes_on_and_records_no_change() -> None:
    weights = {"code": 0.4, "prose": 0.6}
    straight = drawn(ledger(weights), 50)
    first = ledger(weights)
    resumed = drawn(first, 23)
    second = ledger({"prose": 6.0, "code": 4.0}, first.state())
    assert resumed + drawn(second, 27) == straight
    assert len(second.state()["blends"]) == 1


def test_drawing_twice_without_counting_gives_the_same() -> None:
    book = ledger({"code": 1.0, "web": 2.0})
    one, other = book.draw(9), book.draw(9)
    assert np.array_equal(one.source, other.source)
    assert np.array_equal(one.ordinal, other.ordinal)


def test_state_is_not_shared_with_the_ledger_that_gave_it() -> None:
    book = ledger({"code": 1.0})
    state = book.state()
    before = json.dumps(state)
    drawn(ledger({"code": 1.0}, state), 3)
    drawn(book, 3)
    assert json.dumps(state) == before


def test_history_keeps_each_blend_that_was_drawn_from() -> None:
    book = ledger({"code": 1.0})
    drawn(book, 4)
    book = ledger({"code": 1.0, "web": 3.0}, book.state())
    book = ledger({"code": 1.0, "web": 1.0}, book.state())
    drawn(book, 2)
    book = ledger({"web": 1.0}, book.state())
    state = book.state()
    assert [entry["weights"] for entry in state["blends"]] == [
        {"code": 1.0},
        {"code": 1.0, "web": 1.0},
        {"web": 1.0},
    ]
    assert [entry["drawn"] for entry in state["blends"]] == [
        {"code": 0},
        {"code": 4, "web": 0},
        {"code": 5, "web": 1},
    ]


def test_blend_that_is_taken_back_before_a_draw_leaves_no_trace() -> None:
    book = ledger({"code": 1.0, "web": 2.0})
    drawn(book, 4)
    before = book.state()
    changed = ledger({"code": 1.0, "web": 1.0}, before)
    assert ledger({"code": 1.0, "web": 2.0}, changed.state()).state() == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 2}, "run.seed=2, but the checkpoint's stream was drawn with 1"),
        ({"unit_tokens": 8}, "data.unit_tokens=8, .* with 4"),
    ],
)
def test_another_stream_is_refused(changes: dict[str, int], message: str) -> None:
    state = ledger({"code": 1.0}).state()
    with pytest.raises(DataError, match=message):
        ledger({"code": 1.0}, state, **changes)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (SourceCount(8), r"'code' is 8 units of , but the checkpoint has 7 units of ;"),
        (SourceCount(7, content="ab"), "'code' is 7 units of ab, but the checkpoint has 7 units"),
    ],
)
def test_source_of_other_content_is_refused_also_after_it_was_retired(
    other: SourceCount, message: str
) -> None:
    state = ledger({"web": 1.0}, ledger({"code": 1.0}).state()).state()
    with pytest.raises(DataError, match=message):
        blend = BlendEntry(weights={"code": 1.0}, drawn={})
        Ledger({"code": other}, blend, seed=1, unit_tokens=4, state=state)


@pytest.mark.parametrize("state", [{}, {"seed": "x"}, {"sources": object()}])
def test_damaged_state_is_one_clear_line(state: dict) -> None:
    with pytest.raises(DataError, match="data ledger is invalid") as caught:
        ledger({"code": 1.0}, state)
    assert "\n" not in str(caught.value)


def test_source_under_a_new_name_is_refused_unless_the_old_one_stays() -> None:
    sizes = {name: SourceCount(10, content="c0ffee") for name in ("old", "new")}
    sizes["other"] = SourceCount(10, content="cafe")

    def named(weights: dict[str, float], state: dict | None = None) -> Ledger:
        known = {name: sizes[name] for name in weights}
        blend = BlendEntry(weights=weights, drawn={})
        return Ledger(known, blend, seed=1, unit_tokens=4, state=state)

    book = named({"old": 1.0})
    named({"new": 1.0}, book.state())  # nothing was drawn yet
    drawn(book, 4)
    refusal = (
        "'new' has the content of 'old', of which 4 of 10 units were drawn .* rename it to 'old'"
    )
    with pytest.raises(DataError, match=refusal):
        named({"new": 1.0, "other": 1.0}, book.state())
    named({"other": 1.0}, book.state())
    named({"old": 1.0, "new": 1.0}, book.state())
    anew = named({"old": 0.0, "new": 1.0}, book.state())
    assert drawn(anew, 2) == [("new", 0), ("new", 1)]
    # A name that was used since stays what it was.
    named({"new": 1.0}, anew.state())


@given(
    spans=st.lists(
        st.tuples(st.sampled_from([1, 2, 8]), st.booleans(), st.integers(0, 30)), max_size=6
    )
)
def test_drawn_tokens_follow_the_length_that_rows_had_when_drawn(
    spans: list[tuple[int, bool, int]],
) -> None:
    """A row of the long context is longer than one of the short, and both are one draw."""
    state, expected, names = None, {}, ("rows", "units")
    for draw_units, has_units, num_draws in spans:
        own = names if has_units else names[:1]
        sizes = {name: SourceCount(9, whole_rows=name == "rows") for name in own}
        blend = BlendEntry(dict.fromkeys(own, 1.0), drawn={}, draw_units=draw_units)
        book = Ledger(sizes, blend, seed=1, unit_tokens=4, state=state)
        for name, _ in drawn(book, num_draws):
            expected[name] = expected.get(name, 0) + draw_units * 4
        state = json.loads(json.dumps(book.state()))
    if state is not None:
        counted = drawn_tokens(parse_state(state))
        assert {name: count for name, count in counted.items() if count} == expected
