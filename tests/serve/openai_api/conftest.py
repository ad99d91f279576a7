"""One server of the known model for the tests of a file that only ask it.

Not one for all files: between these, tests of other packages may set the clock.
"""

from collections.abc import Iterator

import pytest

from tests.serve.openai_api.known_model import Client, asking, known_server
from tests.support.served import Served


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    with known_server() as running:
        yield running


@pytest.fixture(scope="module")
def client(server) -> Iterator[Client]:
    with asking(server) as one:
        yield one
