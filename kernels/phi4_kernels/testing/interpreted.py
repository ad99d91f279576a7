"""A child process that interprets Triton kernels, for callers whose process compiles them.

Triton decides when a kernel is defined whether it is compiled or interpreted, so one process cannot
do both. The child runs functions by name, `module:function` with JSON arguments, and returns
results and errors.
"""

import contextlib
import gc
import importlib
import json
import os
import subprocess
import sys
from typing import IO, Any

from phi4_kernels.errors import GateError


class InterpretedProcess:
    """A child process with TRITON_INTERPRET=1; close it. If it dies, only that call fails."""

    def __init__(self) -> None:
        self._child = _start()

    def call(self, function: str, *, mutant: tuple[str, ...] | None = None, **args: Any) -> Any:
        """Run `module:function(**args)` there.

        Args:
            function: what to run; its result must be JSON.
            mutant: (op, file, old, new, ...), what to change while it runs; see testing.mutants.
            args: JSON values.

        Raises:
            GateError: the function raised, or the process died.
        """
        to_child, from_child = _pipes(self._child)
        try:
            to_child.write(json.dumps([function, mutant, args]) + "\n")
            to_child.flush()
            answer = from_child.readline()
        except BrokenPipeError:
            answer = ""
        # An access out of range ends the process; the next call starts a new one.
        if not answer:
            self.close()
            code = self._child.returncode
            self._child = _start()
            raise GateError(
                f"the interpreting process died (exit {code}) in {function} {args}; "
                "expected an answer; look for an address out of range"
            )
        result, error = json.loads(answer)
        if error is not None:
            raise GateError(error)
        return result

    def close(self) -> None:
        """End the process."""
        to_child, from_child = _pipes(self._child)
        with contextlib.suppress(BrokenPipeError):
            to_child.close()
        from_child.close()
        self._child.wait()


def _pipes(child: subprocess.Popen) -> tuple[IO[str], IO[str]]:
    assert child.stdin is not None and child.stdout is not None
    return child.stdin, child.stdout


def _start() -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "phi4_kernels.testing.interpreted"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
    )


def _answer(request: str) -> tuple[Any, str | None]:
    name, mutant, arguments = json.loads(request)
    module, _, function = name.partition(":")
    run = getattr(importlib.import_module(module), function)
    try:
        if mutant is None:
            return run(**arguments), None
        from phi4_kernels.testing import mutants

        with mutants.mutant(*mutant):
            return run(**arguments), None
    except Exception as error:  # any error is returned to the caller
        return None, f"{type(error).__name__}: {error}"


def _serve() -> None:
    # Results use a separate pipe: a print inside a function must not break the protocol.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    # Imports make no garbage worth a collection, and collections take a third of their time. What
    # is imported stays: no later collection, at the exit neither, walks it again.
    gc.disable()
    importlib.import_module("torch")
    gc.freeze()
    gc.enable()
    for request in sys.stdin:
        answers.write(json.dumps(_answer(request)) + "\n")
        answers.flush()


if __name__ == "__main__":
    _serve()
