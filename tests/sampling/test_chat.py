"""Conversations as prompts: in ids, read back, and growing by what was drawn."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phi4.data.vocabulary.chat import Message, Role
from phi4.errors import DataError
from phi4.sampling.chat import chat_prompt, next_prompt, plain_text, read_chat_prompt

SPECIAL = ["<|im_end|>", "<|im_start|>", "<|im_sep|>", "<|endoftext|>"]
OTHERS = ["system", "user", "assistant", "the", "ST", " ", "\n", "é", "北", "🙂", "\ufffd"]
CONTENT = st.lists(st.sampled_from(SPECIAL + OTHERS), max_size=6).map("".join)
MESSAGES = st.lists(st.builds(Message, st.sampled_from(Role), CONTENT), max_size=4).map(tuple)
HELLO = Message(Role.USER, "hello")


@given(MESSAGES)
def test_turns_are_read_back_whatever_was_typed(tokenizer, messages) -> None:
    assert read_chat_prompt(chat_prompt(messages, tokenizer), tokenizer) == messages


@given(MESSAGES)
def test_typed_special_tokens_end_no_turn(tokenizer, messages) -> None:
    ids = chat_prompt(messages, tokenizer)
    assert ids.count(tokenizer.im_end_id) == len(messages)
    assert ids.count(tokenizer.im_start_id) == len(messages) + 1


@given(MESSAGES, CONTENT, st.sampled_from(["cut", "turn", "document"]))
def test_next_prompt_is_the_whole_conversation(tokenizer, messages, answer, end) -> None:
    prompt = chat_prompt(messages, tokenizer)
    ends = {"cut": (), "turn": (tokenizer.im_end_id,), "document": (tokenizer.eod_id,)}
    drawn = (*tokenizer.encode(answer), *ends[end])
    grown = next_prompt(prompt, drawn, HELLO, tokenizer)
    said = (*messages, Message(Role.ASSISTANT, answer), HELLO)
    assert grown == chat_prompt(said, tokenizer)
    assert grown[: len(prompt)] == prompt


def test_next_prompt_keeps_the_ids_that_were_drawn(tokenizer) -> None:
    prompt = chat_prompt((HELLO,), tokenizer)
    drawn = tuple(b"the")
    assert tokenizer.encode("the") != list(drawn)
    grown = next_prompt(prompt, drawn, HELLO, tokenizer)
    assert grown[len(prompt) :][: len(drawn)] == drawn


def test_other_ids_are_no_conversation(tokenizer) -> None:
    t = tokenizer
    header = chat_prompt((), t)
    unknown = (t.im_start_id, *t.encode("tool"), t.im_sep_id, 65, t.im_end_id)
    for ids, message in (
        ((65,), "does not end with the header of an assistant turn"),
        ((), "does not end with the header of an assistant turn"),
        ((*header, 65, *header), "last turn has no end"),
        ((*unknown, *header), "a turn without a role of phi-4"),
        ((*header, t.eod_id, t.im_end_id, *header), "special token <|endoftext|>"),
        ((*header, 0xF0, t.im_end_id, *header), "the ids are not UTF-8"),
    ):
        with pytest.raises(DataError) as caught:
            read_chat_prompt(ids, t)
        assert message in str(caught.value)


@given(CONTENT)
def test_plain_text_is_what_was_encoded(tokenizer, text: str) -> None:
    assert plain_text(tokenizer.encode(text), tokenizer) == text
