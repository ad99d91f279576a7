"""Processes that the kernel gates share: Triton interprets in one, and only compiles in another."""

import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from phi4_kernels.testing.interpreted import InterpretedProcess


@pytest.fixture(scope="session")
def compiling() -> Iterator[subprocess.Popen]:
    """The compile gate, at work beside the other tests."""
    command = [sys.executable, "-m", "phi4_kernels.testing", "compile", "--json"]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    yield child
    child.kill()
    child.wait()


@pytest.fixture(scope="session")
def compiled(compiling: subprocess.Popen) -> dict[str, Any]:
    """What every shipped launch compiles to: `found` resources, `unreached` ladder rows."""
    output, _ = compiling.communicate()
    assert compiling.returncode == 0
    return json.loads(output)


@pytest.fixture(scope="session")
def interpreted(compiling: subprocess.Popen) -> Iterator[InterpretedProcess]:
    """A process in which Triton interprets; it starts the compile gate beside it."""
    process = InterpretedProcess()
    yield process
    process.close()


@pytest.fixture(autouse=True)
def _compiled_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.delenv("PHI4_KERNELS_DEBUG", raising=False)
