"""A vocabulary small enough to spell by hand."""

import pytest

from phi4.data.vocabulary.tokenizer import Tokenizer
from tests.pts.search.planted import small_tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return small_tokenizer()
