"""The parsed files of the product, read once for all tests that look at them."""

from collections.abc import Sequence

import pytest

from tests.architecture.import_graph import Source, read_sources
from tests.architecture.sizes import ROOT


@pytest.fixture(scope="session")
def sources() -> Sequence[Source]:
    """Every file of phi4/ and phi4_kernels/."""
    return read_sources(ROOT)
