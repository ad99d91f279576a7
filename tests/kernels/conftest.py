"""What the kernel gates share: a process in which Triton interprets, and the compiled launches."""

import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from phi4_kernels.testing.interpreted import InterpretedProcess


@pytest.fixture(scope="session")
def compiled() -> dict[str, Any]:
    """What every shipped launch compiles to: `found` resources, `unreached` ladder rows."""
    command = [sys.executable, "-m", "phi4_kernels.testing", "compile", "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


@pytest.fixture(scope="session")
def interpreted() -> Iterator[InterpretedProcess]:
    """A process in which Triton interprets."""
    process = InterpretedProcess()
    yield process
    process.close()


@pytest.fixture(scope="session")
def mutated() -> Iterator[InterpretedProcess]:
    """Another one, for mutants: they may write where they should not."""
    process = InterpretedProcess()
    yield process
    process.close()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Inputs do not depend on which tests ran before."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _compiled_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.delenv("PHI4_KERNELS_DEBUG", raising=False)
