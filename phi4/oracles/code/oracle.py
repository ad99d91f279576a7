"""The oracle for programs: several sandboxes at once, one verdict per answer.

An answer is wrong only because of its own program's behaviour. Any other failure, of a key, a
missing compiler or a sandbox, makes it ungradable.
"""

import os
import subprocess
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from phi4.errors import PlatformError
from phi4.oracles.code.fences import program_in
from phi4.oracles.code.function_run import grade_function
from phi4.oracles.code.key import CodeKey, read_key
from phi4.oracles.code.program_run import grade_program
from phi4.oracles.sandbox import Tools, find_tools
from phi4.oracles.sandbox.languages import LANGUAGES, Toolchain, find_toolchain
from phi4.oracles.verdict import Grade, Graded, ToGrade

_VERSION_FLAGS = {"go": "version"}


class CodeOracle:
    """Runs the program of an answer on the cases of its key.

    A key is `{"language": "python", "function": name, "cases": [{"arguments", "expected"}]}`, or
    `{"language", "cases": [{"stdin", "expected"}]}` for a program of any language; docs/oracles.md
    has the rest.

    Args:
        num_workers: answers graded at once; defaults to the processors of this process.
        tools: programs that build the sandbox.

    Raises:
        PlatformError: the sandbox cannot be built on this machine.
    """

    name = "code"

    def __init__(self, num_workers: int | None = None, tools: Tools | None = None) -> None:
        self._num_workers = num_workers or len(os.sched_getaffinity(0))
        self._tools = find_tools() if tools is None else tools
        self._languages: dict[str, tuple[Toolchain, Mapping[str, str]] | str] = {}
        self._lock = threading.Lock()

    def grade(self, answers: Sequence[ToGrade]) -> list[Graded]:
        """See `Oracle.grade`."""
        with ThreadPoolExecutor(self._num_workers) as pool:
            return list(pool.map(self._graded, answers))

    def close(self) -> None:
        """See `Oracle.close`; no process outlives a verdict."""

    def _graded(self, one: ToGrade) -> Graded:
        try:
            key = read_key(one.key)
        except ValueError as error:
            return Graded(Grade.UNGRADABLE, str(error))
        with self._lock:
            if key.language not in self._languages:
                self._languages[key.language] = _present(key.language)
        present = self._languages[key.language]
        if isinstance(present, str):
            return Graded(Grade.UNGRADABLE, present)
        toolchain, versions = present
        versions = {"bwrap": self._tools.bwrap_version, **versions}
        try:
            outcome, reason = self._verdict(one.answer, key, toolchain)
        except Exception as error:
            outcome, reason = Grade.UNGRADABLE, f"the oracle failed: {error!r}"
        return Graded(outcome, " ".join(reason.split()), versions)

    def _verdict(self, answer: str, key: CodeKey, toolchain: Toolchain) -> tuple[Grade, str]:
        source = program_in(answer, LANGUAGES[key.language].labels)
        if key.function is not None:
            return grade_function(source, key, self._tools)
        return grade_program(source, key, toolchain, self._tools)


def _present(language: str) -> tuple[Toolchain, Mapping[str, str]] | str:
    """Return toolchain and version of a language, or why it cannot be run."""
    try:
        toolchain = find_toolchain(language)
    except PlatformError as error:
        return f"no {language}: {error}"
    first = LANGUAGES[language].programs[0]
    flag = _VERSION_FLAGS.get(first, "--version")
    told = subprocess.run([toolchain.paths[first], flag], capture_output=True, text=True, env={})
    return toolchain, {language: (told.stdout or told.stderr).partition("\n")[0].strip()}
