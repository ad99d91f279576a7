"""Ids as text and back, special tokens under their names, for files of programs that hold text.

The decision: text stands for ids only where encoding it gives these very ids. Anything else would
train on another prefix than the one that was measured.
"""

import re
from collections.abc import Sequence

from phi4.data.vocabulary.tokenizer import Tokenizer


class TokenText:
    """Text of ids under a tokenizer that reads the names of special tokens as these tokens."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        names = sorted(map(re.escape, tokenizer.special_tokens), key=len, reverse=True)
        self._special = re.compile(f"({'|'.join(names)})")

    def ids(self, text: str) -> list[int]:
        """The ids of a text."""
        ids: list[int] = []
        for piece in filter(None, self._special.split(text)):
            special = self._tokenizer.special_tokens.get(piece)
            ids += self._tokenizer.encode(piece) if special is None else [special]
        return ids

    def text(self, prefix: Sequence[int], token: int) -> tuple[str, str] | None:
        """The texts of a prefix and of a token behind it; None where they mean other ids.

        Args:
            prefix: ids.
            token: that follows.
        """
        ids = [*map(int, prefix), token]
        pieces = [self._tokenizer.bytes_of(token_id) for token_id in ids]
        try:
            before, after = b"".join(pieces[:-1]).decode(), pieces[-1].decode()
        except UnicodeDecodeError:
            return None
        return (before, after) if self.ids(before + after) == ids else None
