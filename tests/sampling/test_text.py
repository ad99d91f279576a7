"""What is shown of token ids: whole characters, and nothing of a stop string."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from phi4.data.vocabulary.tokenizer import Tokenizer
from phi4.errors import TokenizerError
from phi4.sampling.protocol import Completion, FinishReason, Request, Token
from phi4.sampling.text import StopStrings, TextStream, completion_text, end_ids, text_pieces

CAT, EMOJI = b" cat sat", "🙂".encode()
# Two letters, so that stop strings overlap each other and the text.
LETTERS = st.lists(st.sampled_from([b"a", b"b"]), max_size=4).map(b"".join)
CHUNKS = st.lists(LETTERS, max_size=12)
TEXTS = st.lists(st.sampled_from("a \nTSOPé北🙂\u0301\ufffd\U0010ffff")).map("".join)
STOPS = st.lists(LETTERS.filter(bool), max_size=4).map(tuple)


def ids_of(tokenizer: Tokenizer, *tokens: bytes) -> list[int]:
    return [tokenizer.mergeable_ranks[token] for token in tokens]


def naive_stop(text: bytes, stops: tuple[bytes, ...]) -> tuple[bytes, bytes | None]:
    """Text before the first stop string, and that, by looking at every beginning of the text."""
    for end in range(len(text) + 1):
        matches = [stop for stop in stops if text[:end].endswith(stop)]
        if matches:
            longest = max(matches, key=len)
            return text[: end - len(longest)], longest
    return text, None


def naive_held(text: bytes, stops: tuple[bytes, ...]) -> bytes:
    """The longest end of a text that is a proper prefix of a stop string."""
    prefixes = {stop[:length] for stop in stops for length in range(len(stop))}
    return max((p for p in prefixes if text.endswith(p)), key=len, default=b"")


@given(CHUNKS, STOPS)
@example([b"aab"], (b"b", b"ab"))
def test_stop_strings_are_found_as_in_the_whole_text(chunks, stops) -> None:
    strings = StopStrings(stops)
    shown = b"".join(map(strings.feed, chunks)) + strings.finish()
    assert (shown, strings.matched) == naive_stop(b"".join(chunks), stops)


@given(CHUNKS, STOPS)
@example([b"aa"], (b"aab",))
def test_only_a_proper_prefix_of_a_stop_string_is_held_back(chunks, stops) -> None:
    strings, shown, read = StopStrings(stops), b"", b""
    for chunk in chunks:
        shown, read = shown + strings.feed(chunk), read + chunk
        if strings.matched is not None:
            break
        assert shown + naive_held(read, stops) == read


@given(st.data())
def test_pieces_join_to_the_decoded_text(tokenizer, data) -> None:
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=40))
    assert "".join(text_pieces(tokenizer, ids)) == tokenizer.decode(ids)


@given(TEXTS)
def test_no_piece_of_a_text_holds_part_of_a_character(tokenizer, text: str) -> None:
    pieces = list(text_pieces(tokenizer, tokenizer.encode(text)))
    assert "".join(pieces) == text
    assert "\ufffd" in text or not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize("stop", [b"STOP", b"TO", b"OP"])
def test_stop_string_across_tokens_is_never_shown(tokenizer, stop: bytes) -> None:
    split = [CAT, EMOJI[:2], EMOJI[2:3], EMOJI[3:], b"ST", b"OP", b"the"]
    pieces = list(text_pieces(tokenizer, ids_of(tokenizer, *split), stop_strings=(stop,)))
    text = " cat sat🙂STOPthe"
    assert "".join(pieces) == text[: text.index(stop.decode())]
    assert pieces[:4] == [" cat sat", "", "", "🙂"]


def test_beginning_of_a_stop_string_that_ends_the_text_is_shown(tokenizer) -> None:
    pieces = list(text_pieces(tokenizer, ids_of(tokenizer, CAT, b"ST"), stop_strings=(b"STOP",)))
    assert pieces == [" cat sat", "", "ST"]


def test_character_cut_by_length_is_one_replacement_at_the_end(tokenizer) -> None:
    ids = ids_of(tokenizer, CAT, EMOJI[:2], EMOJI[2:3])
    assert list(text_pieces(tokenizer, ids)) == [" cat sat", "", "", "\ufffd"]


def test_each_end_of_a_text_is_an_end_and_has_no_text(tokenizer) -> None:
    ends = end_ids(tokenizer)
    assert {tokenizer.bytes_of(i) for i in ends} == {b"<|endoftext|>", b"<|im_end|>"}
    for end in ends:
        assert "".join(text_pieces(tokenizer, [65, end], stop_ids=ends)) == "A"


def test_text_of_a_completion_lacks_what_ended_it(tokenizer) -> None:
    request = Request(prompt=(1,), max_tokens=9, stop_strings=(b"sat",), stop_ids=frozenset((2,)))
    for drawn, text in (((CAT,), " cat "), ((b"the", b"\x02"), "the")):
        tokens = tuple(map(Token, ids_of(tokenizer, *drawn)))
        completion = Completion(0, 0, tokens, FinishReason.STOP)
        assert completion_text(tokenizer, request, completion) == text


def test_foreign_id_has_no_text(tokenizer) -> None:
    stream = TextStream(tokenizer)
    for wrong in (-1, tokenizer.vocab_size):
        with pytest.raises(TokenizerError, match=f"cannot decode token id {wrong}"):
            stream.feed(wrong)
