"""The oracle for mathematical answers.

Exact comparison comes first; math-verify decides only the rest, in separate processes.
"""

import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata

from phi4.oracles.math.comparing import Compared, compare
from phi4.oracles.math.final_answer import final_answer
from phi4.oracles.math.workers import VerifyWorkers
from phi4.oracles.verdict import Grade, Graded, ToGrade

_REMEDY = "math-verify is not installed; pip install 'phi4[posttraining]'"
_COMMAND = re.compile(r"\\(?:begin|end)\{[a-z]*matrix\}|\\[a-zA-Z]+")
_WORDS = re.compile(r"[A-Za-z]{3,}|\b(?:or|is|if|to|in|of|as|at|by|no|on|so)\b")
_FUNCTIONS = set(
    [
        "sin",
        "cos",
        "tan",
        "cot",
        "sec",
        "csc",
        "log",
        "exp",
        "sqrt",
        "arcsin",
        "arccos",
        "arctan",
        "min",
        "max",
        "gcd",
        "lcm",
    ]
)
_HUGE = re.compile(r"\^\s*\{?\s*-?\d{4,}|\^[^^]{0,20}\^|\d{4,}\s*!|!\s*\)?\s*!")
"""Expressions that a symbolic library would compute to the last digit, or crash on."""


class MathOracle:
    """Grades whether the last box of an answer, or its last statement, equals the key.

    A key is the right answer: a string, in LaTeX or plain, or a number. docs/oracles.md defines
    equality.

    Args:
        num_workers: processes of math-verify; defaults to the processors of this process.
    """

    name = "math"

    def __init__(self, num_workers: int | None = None) -> None:
        self._num_workers = num_workers or len(os.sched_getaffinity(0))
        self._workers = VerifyWorkers(self._num_workers)
        self._version = _version()

    def grade(self, answers: Sequence[ToGrade]) -> list[Graded]:
        """See `Oracle.grade`."""
        with ThreadPoolExecutor(self._num_workers) as pool:
            return list(pool.map(self._graded, answers))

    def close(self) -> None:
        """See `Oracle.close`."""
        self._workers.close()

    def _graded(self, one: ToGrade) -> Graded:
        try:
            return self._verdict(one)
        except Exception as error:
            return Graded(Grade.UNGRADABLE, f"the oracle failed: {error!r}"[:300])

    def _verdict(self, one: ToGrade) -> Graded:
        key = _key_text(one.key)
        if key is None:
            return Graded(
                Grade.UNGRADABLE, f"key is {one.key!r:.60}; expected a string or a number"
            )
        answer = final_answer(one.answer)
        if answer is None:
            return Graded(Grade.WRONG, "states no answer")
        compared = compare(final_answer(key) or key, answer)
        if compared.grade is not None:
            return Graded(compared.grade, compared.reason)
        return self._verified(compared)

    def _verified(self, compared: Compared) -> Graded:
        for text in (compared.key, compared.answer):
            if _HUGE.search(text):
                return Graded(Grade.UNGRADABLE, "a power or factorial is too large to compute")
            words = set(_WORDS.findall(_COMMAND.sub(" ", text))) - _FUNCTIONS
            if words or r"\text" in text:
                return Graded(Grade.UNGRADABLE, "holds words")
            if r"\circ" in text:
                return Graded(Grade.UNGRADABLE, "has degrees, which math-verify does not support")
        if self._version is None:
            return Graded(Grade.UNGRADABLE, _REMEDY)
        grade, reason = self._workers.ask(compared.key, compared.answer)
        return Graded(grade, reason, {"math-verify": self._version})


def _key_text(key: object) -> str | None:
    """Return the right answer as text; None if a key is something else."""
    if isinstance(key, bool) or not isinstance(key, str | int | float):
        return None
    text = str(key).strip()
    return text or None


def _version() -> str | None:
    try:
        return metadata.version("math-verify")
    except metadata.PackageNotFoundError:
        return None
