"""Convert ids to text and back, with special tokens by name, for programs that use text.

Text is used only if encoding it gives exactly the same ids. Otherwise training would use another
prefix than the one that was measured.
"""

import re
from collections.abc import Iterable

from phi4.data.vocabulary.tokenizer import Tokenizer


class TokenText:
    """Text of ids as encoded with phi-4's published tokenizer.

    Names of special tokens are these tokens, and absorb the spaces on both sides.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        names = sorted(map(re.escape, tokenizer.special_tokens), key=len, reverse=True)
        self._special = re.compile(f"({'|'.join(names)})")

    def ids(self, text: str) -> list[int]:
        """Encode a text."""
        ids: list[int] = []
        # Alternating texts and names, beginning and ending with a text.
        pieces = self._special.split(text)
        for number, piece in enumerate(pieces):
            if number % 2:
                ids.append(self._tokenizer.special_tokens[piece])
                continue
            if number > 0:
                piece = piece.lstrip()
            if number < len(pieces) - 1:
                piece = piece.rstrip()
            ids += self._tokenizer.encode(piece)
        return ids

    def text(self, prefix: Iterable[int], token: int) -> tuple[str, str] | None:
        """Return the texts of a prefix and of the token after it; None if they would encode to
        other ids.

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
