"""Parse the key of a program: the language, and its test cases.

A key that is not completely understood grades nothing, because ignoring a misspelt member would
change the comparison.
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from phi4.oracles.sandbox.languages import LANGUAGES


@dataclass(frozen=True)
class FunctionCase:
    """A function call: positional arguments, and the expected return value."""

    arguments: list
    expected: object


@dataclass(frozen=True)
class ProgramCase:
    """A program run: standard input, and the expected standard output."""

    stdin: str
    expected: str


@dataclass(frozen=True)
class CodeKey:
    """A parsed key.

    Attributes:
        language: a key of `LANGUAGES`.
        function: name of the function to call; None to run the program.
        cases: cases of one kind, at least one.
        tolerance: largest difference of two numbers, absolute or relative; None for exact.
        cpu_seconds: processor time: of all calls of a function together, or of each run of a
            program.
    """

    language: str
    function: str | None
    cases: tuple[FunctionCase | ProgramCase, ...]
    tolerance: float | None = None
    cpu_seconds: float = 5.0

    @property
    def function_cases(self) -> list[FunctionCase]:
        """All cases, where a function is called."""
        return [case for case in self.cases if isinstance(case, FunctionCase)]

    @property
    def program_cases(self) -> list[ProgramCase]:
        """All cases, where the program is run."""
        return [case for case in self.cases if isinstance(case, ProgramCase)]


def read_key(key: object) -> CodeKey:
    """Parse and check a key.

    Raises:
        ValueError: it is invalid; the message says what is wrong, in one line.
    """
    if not isinstance(key, Mapping):
        raise ValueError(f"key is {_short(key)}; expected a table of language and cases")
    known = {"language", "function", "cases", "tolerance", "cpu_seconds"}
    if unknown := sorted(map(str, set(key) - known)):
        raise ValueError(f"key has {unknown[0]!r}; expected only {', '.join(sorted(known))}")
    language, function = key.get("language"), key.get("function")
    if not isinstance(language, str) or language not in LANGUAGES:
        raise ValueError(f"language is {_short(language)}; expected one of {', '.join(LANGUAGES)}")
    if function is not None:
        if language != "python":
            raise ValueError(
                f"function with language {language}; only python functions can be called"
            )
        if not isinstance(function, str) or not function.isidentifier():
            raise ValueError(f"function is {_short(function)}; expected a name")
    cases = key.get("cases")
    if not isinstance(cases, list) or not cases:
        raise ValueError(f"cases is {_short(cases)}; expected a list of at least one")
    read: Callable[[object], FunctionCase | ProgramCase]
    read = _function_case if function is not None else _program_case
    cpu_seconds = _positive(key, "cpu_seconds")
    return CodeKey(
        language,
        function,
        tuple(read(case) for case in cases),
        _positive(key, "tolerance"),
        CodeKey.cpu_seconds if cpu_seconds is None else cpu_seconds,
    )


def _function_case(case: object) -> FunctionCase:
    names = ("arguments", "expected")
    if not isinstance(case, Mapping) or set(case) != set(names):
        raise ValueError(f"case is {_short(case)}; expected arguments and expected")
    if not isinstance(case["arguments"], list):
        raise ValueError(f"arguments is {_short(case['arguments'])}; expected a list")
    try:
        # As the other side will see them: a tuple becomes a list, and NaN is invalid.
        return FunctionCase(*json.loads(json.dumps([case[n] for n in names], allow_nan=False)))
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"case is not JSON: {error}") from error


def _program_case(case: object) -> ProgramCase:
    if not isinstance(case, Mapping) or set(case) != {"stdin", "expected"}:
        raise ValueError(f"case is {_short(case)}; expected stdin and expected")
    for name in ("stdin", "expected"):
        if not isinstance(case[name], str):
            raise ValueError(f"{name} is {_short(case[name])}; expected a string")
    return ProgramCase(case["stdin"], case["expected"])


def _positive(key: Mapping, name: str) -> float | None:
    value = key.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError(f"{name} is {_short(value)}; expected a positive number")
    return float(value)


def _short(value: object) -> str:
    try:
        text = repr(value)
    except Exception:
        text = f"a {type(value).__name__}"
    return text if len(text) <= 60 else f"{text[:57]}..."
