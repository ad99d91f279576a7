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

    def text(self, ids: Sequence[int]) -> str | None:
        """The text that encodes to these ids; None where there is none."""
        try:
            text = b"".join(self._tokenizer.bytes_of(int(i)) for i in ids).decode()
        except UnicodeDecodeError:
            return None
        return text if self.ids(text) == [int(i) for i in ids] else None

    def follows(self, prefix: Sequence[int], text: str, token: int) -> str | None:
        """The text of a token behind a prefix, where the two together encode to their ids.

        Args:
            prefix: ids.
            text: of the prefix.
            token: that follows it.
        """
        try:
            piece = self._tokenizer.bytes_of(token).decode()
        except UnicodeDecodeError:
            return None
        return piece if self.ids(text + piece) == [*(int(i) for i in prefix), token] else None
