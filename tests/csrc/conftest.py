"""The build that all tests of csrc share: cached by the hash of its sources."""

import shutil
from pathlib import Path

import pytest
from phi4_kernels import native

from tests.csrc.host_forms import HostForms
from tools import build_csrc


@pytest.fixture(scope="session")
def built() -> Path:
    """The folder of the library and ptxas's report."""
    if shutil.which("nvcc") is None and native.missing():
        pytest.skip("nvcc is not on PATH, and csrc is not built")
    return build_csrc.build()


@pytest.fixture(scope="session")
def loaded(built: Path) -> Path:
    """The library, its operators defined."""
    native.load()
    return built / native.LIBRARY


@pytest.fixture(scope="session")
def forms(loaded: Path) -> HostForms:
    """The host forms of the shipped arithmetic."""
    return HostForms(loaded)
