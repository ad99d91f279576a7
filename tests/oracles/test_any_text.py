"""Whatever is in an answer or a key, a verdict comes back and nothing is raised."""

from collections.abc import Mapping, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phi4.oracles.choice import ChoiceOracle
from phi4.oracles.code import CodeOracle
from phi4.oracles.code.forgeries import KEY
from phi4.oracles.exact import ExactOracle
from phi4.oracles.math import MathOracle
from phi4.oracles.math.workers import VerifyWorkers
from phi4.oracles.sandbox import Tools
from phi4.oracles.verdict import Grade, Graded, Oracle, ToGrade

PIECES = (r"\boxed{", "}", r"\frac", "{1}", "(B)", "answer is", "A", "$", r"\text{cm}", "50%", ",")
TEXTS = st.text(max_size=60) | st.lists(
    st.sampled_from((*PIECES, "1", "^", "!", "=", " ", "\n", "x", "```", "```python\n")),
    max_size=14,
).map("".join)
KEYS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
NAMED = st.fixed_dictionaries(
    {},
    optional={
        "language": KEYS | st.just("python"),
        "function": KEYS | st.just("f"),
        "cases": KEYS | st.lists(st.fixed_dictionaries({"arguments": KEYS, "expected": KEYS})),
        "tolerance": KEYS,
        "letter": KEYS | st.just("B"),
        "options": KEYS,
    },
)


def checked(graded: Sequence[Graded], count: int) -> None:
    assert len(graded) == count
    for one in graded:
        assert isinstance(one, Graded)
        assert isinstance(one.outcome, Grade)
        assert "\n" not in one.reason
        assert one.reason or one.outcome is Grade.RIGHT


@pytest.fixture(scope="module")
def no_workers() -> MathOracle:
    # The texts that reach math-verify are of no use here: each would take it a while.
    oracle = MathOracle(num_workers=1)
    patch = pytest.MonkeyPatch()
    patch.setattr(VerifyWorkers, "ask", lambda self, key, answer: (Grade.UNGRADABLE, "not asked"))
    yield oracle
    patch.undo()


@pytest.mark.parametrize("oracle", [ExactOracle(), ChoiceOracle()], ids=lambda one: one.name)
@given(answer=TEXTS, key=KEYS | NAMED)
@settings(max_examples=60)
def test_plain_oracles_always_answer(oracle: Oracle, answer: str, key: object) -> None:
    checked(oracle.grade([ToGrade(answer, key)]), 1)


@given(answer=TEXTS, key=KEYS | NAMED)
@settings(max_examples=80)
def test_mathematics_always_answers(no_workers: MathOracle, answer: str, key: object) -> None:
    checked(no_workers.grade([ToGrade(answer, key)]), 1)


@given(texts=st.lists(TEXTS, min_size=20, max_size=20))
@settings(max_examples=1)
def test_programs_always_get_a_verdict(tools: Tools, texts: list[str]) -> None:
    oracle = CodeOracle(num_workers=2, tools=tools)
    checked(oracle.grade([ToGrade(text, dict(KEY)) for text in texts]), len(texts))


@given(answer=TEXTS, key=KEYS | NAMED)
@settings(max_examples=50)
def test_keys_of_programs_are_understood_or_refused(
    tools: Tools, answer: str, key: Mapping[str, object]
) -> None:
    # Nothing starts: that takes a program that can never be there.
    broken = Tools("/no/bwrap", "0", None, tools.machine)
    checked(CodeOracle(num_workers=1, tools=broken).grade([ToGrade(answer, key)]), 1)
