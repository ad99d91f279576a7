"""The sandbox of this machine, for the tests that run programs in it."""

import pytest

from phi4.errors import PlatformError
from phi4.oracles.sandbox import Tools, find_tools


@pytest.fixture(scope="session")
def tools() -> Tools:
    try:
        return find_tools()
    except PlatformError as error:
        # Only a missing program is on the list of skips.
        pytest.skip(str(error))
