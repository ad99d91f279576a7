"""The build that all tests of csrc share: cached by the hash of its sources."""

import shutil
from pathlib import Path

import pytest
from phi4_kernels import cuda_library

from tests.csrc.host_forms import HostForms, build_host_forms
from tools import build_csrc


@pytest.fixture(scope="session")
def built() -> Path:
    """The folder of the library and ptxas's report."""
    if shutil.which("nvcc") is None and cuda_library.missing():
        pytest.skip("nvcc is not on PATH, and csrc is not built")
    return build_csrc.build()


@pytest.fixture(scope="session")
def loaded(built: Path) -> Path:
    """The library, its operators defined."""
    cuda_library.load()
    return built / cuda_library.LIBRARY


@pytest.fixture(scope="session")
def forms(tmp_path_factory: pytest.TempPathFactory) -> HostForms:
    """The host forms of the shipped arithmetic, built alone: a fifth of the library's time."""
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not on PATH, and the host forms are built")
    return build_host_forms(
        cuda_library.SOURCES, "*", tmp_path_factory.mktemp("forms") / "forms.so"
    )


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The library takes 20 CPU seconds to build, so whatever needs it is slow."""
    for item in items:
        is_here = item.path.parent == Path(__file__).parent
        if is_here and "built" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.slow)
