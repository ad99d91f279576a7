"""Decode token ids to text: characters split over tokens, stop strings that span tokens.

All processing is on bytes. A stop string is searched in the bytes of the tokens, regardless of
token boundaries, and the remaining bytes are decoded last, so neither a part of a stop string nor a
part of a character is ever shown.
"""

import codecs
from collections.abc import Iterable, Iterator

from phi4.data.vocabulary.tokenizer import Tokenizer
from phi4.sampling.protocol import Completion, Request


def end_ids(tokenizer: Tokenizer) -> frozenset[int]:
    """Return the ids that end a text of phi-4: of a document and of a turn. Models use either."""
    return frozenset((tokenizer.eod_id, tokenizer.im_end_id))


def text_pieces(
    tokenizer: Tokenizer,
    ids: Iterable[int],
    stop_ids: frozenset[int] = frozenset(),
    stop_strings: tuple[bytes, ...] = (),
) -> Iterator[str]:
    """Yield the text of ids as they arrive.

    Without stops, the pieces join to `tokenizer.decode` of all ids.
    """
    stream = TextStream(tokenizer, stop_ids, stop_strings)
    for token_id in ids:
        yield stream.feed(token_id)
    yield stream.finish()


def completion_text(tokenizer: Tokenizer, request: Request, completion: Completion) -> str:
    """Return the text of a sample, without the stop that ended it."""
    ids = (token.id for token in completion.tokens)
    return "".join(text_pieces(tokenizer, ids, request.stop_ids, request.stop_strings))


class TextStream:
    """The text of one sample, token by token.

    A character split over tokens is held back until its last byte; invalid bytes are shown as
    U+FFFD. Stop ids have no text; special tokens are shown by name.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop_ids: frozenset[int] = frozenset(),
        stop_strings: tuple[bytes, ...] = (),
    ) -> None:
        self._tokenizer = tokenizer
        self._stop_ids = stop_ids
        self._stops = StopStrings(stop_strings)
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, token_id: int) -> str:
        """Return the text that can be shown after one more token; often empty."""
        if token_id in self._stop_ids:
            return ""
        return self._decoder.decode(self._stops.feed(self._tokenizer.bytes_of(token_id)))

    def finish(self) -> str:
        """Return the held-back text, once no token follows."""
        return self._decoder.decode(self._stops.finish(), final=True)


class StopStrings:
    """Passes bytes up to the first complete stop string; of several, the one that began first.

    Attributes:
        matched: the stop string, once it is complete.
    """

    def __init__(self, strings: tuple[bytes, ...]) -> None:
        self.matched: bytes | None = None
        self._strings = strings
        self._held = b""

    def feed(self, data: bytes) -> bytes:
        """Return the bytes that may be shown after some more bytes; nothing after a stop string.

        Only the longest suffix that may still become a stop string is held back.
        """
        if self.matched is not None:
            return b""
        data = self._held + data
        found = [(data.find(s) + len(s), -len(s), s) for s in self._strings if s in data]
        if found:
            end, _, self.matched = min(found)
            self._held = b""
            return data[: end - len(self.matched)]
        num_held = self._unfinished(data)
        self._held = data[len(data) - num_held :]
        return data[: len(data) - num_held]

    def finish(self) -> bytes:
        """Return the held-back bytes, once nothing follows."""
        held, self._held = self._held, b""
        return held

    def _unfinished(self, data: bytes) -> int:
        """Return the length of the longest suffix of the data that is a proper prefix of a stop
        string."""
        longest = max((len(s) for s in self._strings), default=1) - 1
        lengths = range(min(len(data), longest), 0, -1)
        return next((n for n in lengths if self._begins_one(data[-n:])), 0)

    def _begins_one(self, end: bytes) -> bool:
        return any(s.startswith(end) for s in self._strings)
