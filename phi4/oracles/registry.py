"""Oracles by name: built-in ones, and plug-ins of installed packages.

A plug-in that cannot be loaded raises an error before anything is graded; one that fails during
grading makes an answer ungradable and never ends a run.
"""

from collections.abc import Callable, Mapping, Sequence
from importlib import metadata

from phi4.errors import ConfigError, Phi4Error
from phi4.oracles.choice import ChoiceOracle
from phi4.oracles.code import CodeOracle
from phi4.oracles.exact import ExactOracle
from phi4.oracles.math import MathOracle
from phi4.oracles.verdict import Grade, Graded, Oracle, ToGrade

ENTRY_POINTS = "phi4.oracles"
"""Group of entry points; each is called without arguments and returns an `Oracle`."""

_ORACLES: Mapping[str, Callable[[], Oracle]] = {
    oracle.name: oracle for oracle in (ExactOracle, ChoiceOracle, MathOracle, CodeOracle)
}


def open_oracle(name: str) -> Oracle:
    """Return the oracle of a name.

    Raises:
        ConfigError: there is none, or the package that provides it does not work.
        PlatformError: this machine lacks a requirement.
    """
    if name in _ORACLES:
        return _ORACLES[name]()
    found = metadata.entry_points(group=ENTRY_POINTS)
    named = [entry for entry in found if entry.name == name]
    if not named:
        known = ", ".join([*_ORACLES, *sorted({entry.name for entry in found})])
        raise ConfigError(f"--oracle={name} is unknown; expected one of {known}")
    if len(named) > 1:
        values = " and ".join(entry.value for entry in named)
        raise ConfigError(f"--oracle={name} is {values}; uninstall one of these packages")
    return _opened(named[0])


def _opened(entry: metadata.EntryPoint) -> Oracle:
    try:
        oracle = entry.load()()
    except Phi4Error:
        raise
    except Exception as error:
        raise ConfigError(
            f"--oracle={entry.name} ({entry.value}) cannot be loaded: {_line(error)}; repair or "
            f"uninstall the package that provides it"
        ) from error
    if not callable(getattr(oracle, "grade", None)) or not callable(getattr(oracle, "close", None)):
        raise ConfigError(
            f"--oracle={entry.name} ({entry.value}) is a {type(oracle).__name__} without grade and "
            "close; expected an oracle as phi4.oracles.verdict describes it"
        )
    return GuestOracle(entry.name, oracle)


class GuestOracle:
    """A plug-in oracle, whose failures become verdicts.

    Args:
        name: name of its entry point.
        guest: the plug-in's oracle.
    """

    def __init__(self, name: str, guest: Oracle) -> None:
        self.name = name
        self._guest = guest

    def grade(self, answers: Sequence[ToGrade]) -> list[Graded]:
        """See `Oracle.grade`; if a batch fails, each answer is tried individually."""
        graded = self._tried(answers)
        if isinstance(graded, list):
            return graded
        if len(answers) == 1:
            return [Graded(Grade.UNGRADABLE, graded)]
        return [one for answer in answers for one in self.grade([answer])]

    def close(self) -> None:
        """See `Oracle.close`; its errors are ignored at the end."""
        try:
            self._guest.close()
        except Exception:
            return

    def _tried(self, answers: Sequence[ToGrade]) -> list[Graded] | str:
        """Return its verdicts, or what is wrong with them."""
        try:
            graded = list(self._guest.grade(answers))
        except Exception as error:
            return f"oracle {self.name} failed: {_line(error)}"
        if len(graded) != len(answers):
            return f"oracle {self.name} returned {len(graded)} verdicts for {len(answers)} answers"
        for one in graded:
            if not isinstance(one, Graded) or not isinstance(one.outcome, Grade):
                return f"oracle {self.name} returned a {type(one).__name__}, which is not a verdict"
        return graded


def _line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
