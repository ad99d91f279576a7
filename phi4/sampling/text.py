"""Text over token ids: characters that tokens split, stop strings that span tokens.

The decision: everything is done on bytes. A stop string is searched in the bytes of the tokens,
wherever their borders are, and what is left becomes characters last, so neither a part of a stop
string nor a part of a character is ever shown.
"""

import codecs
from collections.abc import Iterable, Iterator

from phi4.data.vocabulary.tokenizer import Tokenizer
from phi4.sampling.protocol import Completion, Request


def end_ids(tokenizer: Tokenizer) -> frozenset[int]:
    """The ids that end a text of phi-4: of a document and of a turn. Models use either."""
    return frozenset((tokenizer.eod_id, tokenizer.im_end_id))


def text_pieces(
    tokenizer: Tokenizer,
    ids: Iterable[int],
    stop_ids: frozenset[int] = frozenset(),
    stop_strings: tuple[bytes, ...] = (),
) -> Iterator[str]:
    """Text of ids as they come.

    Without stops, the pieces join to `tokenizer.decode` of all ids.
    """
    stream = TextStream(tokenizer, stop_ids, stop_strings)
    for token_id in ids:
        yield stream.feed(token_id)
    yield stream.finish()


def completion_text(tokenizer: Tokenizer, request: Request, completion: Completion) -> str:
    """The text of a sample, without the stop that ended it."""
    ids = (token.id for token in completion.tokens)
    return "".join(text_pieces(tokenizer, ids, request.stop_ids, request.stop_strings))


class TextStream:
    """The text of one sample, token by token.

    A character that tokens split waits for its last byte; bytes that never become a character
    are shown as U+FFFD. Stop ids have no text; special tokens have their names.
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
        """What can be shown after one more token; often nothing."""
        if token_id in self._stop_ids:
            return ""
        return self._decoder.decode(self._stops.feed(self._tokenizer.bytes_of(token_id)))

    def finish(self) -> str:
        """What was held back, once no token follows."""
        return self._decoder.decode(self._stops.finish(), final=True)


class StopStrings:
    """Bytes up to the stop string that is complete first; of several, the one that began first.

    Attributes:
        matched: the stop string, once it is complete.
    """

    def __init__(self, strings: tuple[bytes, ...]) -> None:
        self.matched: bytes | None = None
        self._strings = strings
        self._held = b""

    def feed(self, data: bytes) -> bytes:
        """What may be shown after some more bytes; nothing of what follows the stop string.

        Held back is the longest end that may still become a stop string, and nothing else.
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
        """What was held back, once nothing follows."""
        held, self._held = self._held, b""
        return held

    def _unfinished(self, data: bytes) -> int:
        """Length of the longest end of the data that is a proper prefix of a stop string."""
        longest = max((len(s) for s in self._strings), default=1) - 1
        lengths = range(min(len(data), longest), 0, -1)
        return next((n for n in lengths if self._begins_one(data[-n:])), 0)

    def _begins_one(self, end: bytes) -> bool:
        return any(s.startswith(end) for s in self._strings)
