"""A vocabulary small enough to spell by hand."""

import pytest

from phi4.data.vocabulary.tokenizer import Tokenizer

LONGER_TOKENS = (b"ST", b"OP", b" cat sat", b"\xf0\x9f", b"the", b" end")


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """Every byte under its own id, then LONGER_TOKENS, then the special tokens."""
    tokens = [bytes([value]) for value in range(256)] + list(LONGER_TOKENS)
    return Tokenizer({token: token_id for token_id, token in enumerate(tokens)})
