import jinja2
import pytest
import tiktoken
from hypothesis import given
from hypothesis import strategies as st

from phi4.config import TokenizerConfig
from phi4.convert.hf_tokenizer import CHAT_TEMPLATE
from phi4.data.rows.conversations import read_conversation
from phi4.data.rows.messages import LOSS_FLAGS
from phi4.data.rows.preferences import read_preference
from phi4.data.vocabulary.bpe import train_bpe
from phi4.data.vocabulary.chat import Conversation, Message, Role, encode_chat
from phi4.data.vocabulary.tokenizer import SPLIT_PATTERN, Tokenizer, load_tokenizer
from phi4.errors import DataError

SYSTEM, USER, ASSISTANT = Role
SMALL = Tokenizer(train_bpe(["system user assistant: the cat sat on the mat\n"] * 3, 370))
PLAIN = st.text(st.characters(exclude_categories=["Cs"])).filter(lambda text: "<|" not in text)
TURNS = st.lists(st.builds(Message, st.sampled_from(Role), PLAIN), max_size=6).map(tuple)


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def render(messages: tuple[Message, ...], add_generation_prompt: bool) -> str:
    return jinja2.Template(CHAT_TEMPLATE, keep_trailing_newline=True).render(
        messages=[turn(message.role, message.content) for message in messages],
        add_generation_prompt=add_generation_prompt,
    )


def encode_rendered(text: str, tokenizer: Tokenizer) -> list[int]:
    """What a tokenizer that parses special tokens makes of a rendered conversation."""
    encoding = tiktoken.Encoding(
        "rendered",
        pat_str=SPLIT_PATTERN,
        mergeable_ranks=tokenizer.mergeable_ranks,
        special_tokens=tokenizer.special_tokens,
    )
    return encoding.encode(text, allowed_special="all")


def test_phi4_ids_of_a_conversation(cl100k_file) -> None:
    tokenizer = load_tokenizer(TokenizerConfig(path=str(cl100k_file)))
    messages = [turn("system", "Hello"), turn("user", " World"), turn("assistant", "Hello World")]
    tokens = encode_chat(read_conversation({"messages": messages}), tokenizer, True)
    start, sep, end = 100264, 100266, 100265
    assert tokens.ids == [
        *(start, 9125, sep, 9906, end),
        *(start, 882, sep, 4435, end),
        *(start, 78191, sep, 9906, 4435, end),
        *(start, 78191, sep),
    ]
    assert [i for i, covered in enumerate(tokens.loss_mask) if covered] == [13, 14, 15]


@given(TURNS, st.booleans())
def test_ids_equal_the_rendered_template(messages, add_generation_prompt: bool) -> None:
    tokens = encode_chat(Conversation(messages), SMALL, add_generation_prompt)
    assert tokens.ids == encode_rendered(render(messages, add_generation_prompt), SMALL)


@given(
    st.lists(st.sampled_from(["<|im_end|>", "<|im_start|>", "<|im_sep|>", "a", " ", "\n"])).map(
        "".join
    )
)
def test_special_text_in_content_is_plain_text(content: str) -> None:
    ids = encode_chat(Conversation((Message(USER, content),)), SMALL).ids
    header, body = ids[: ids.index(SMALL.im_sep_id) + 1], ids[ids.index(SMALL.im_sep_id) + 1 : -1]
    assert header == [SMALL.im_start_id, *SMALL.encode("user"), SMALL.im_sep_id]
    assert not set(body) & set(SMALL.special_tokens.values())
    assert SMALL.decode(body) == content


@given(TURNS, st.integers(0, 6))
def test_covered_tokens_are_the_answers_and_their_ends(messages, first_with_loss: int) -> None:
    tokens = encode_chat(Conversation(messages, first_with_loss), SMALL, True)
    pairs = zip(tokens.ids, tokens.loss_mask, strict=True)
    found = [id_ for id_, is_in_loss in pairs if is_in_loss]
    answers = [m.content for m in messages[first_with_loss:] if m.role is ASSISTANT]
    assert found == [id_ for text in answers for id_ in [*SMALL.encode(text), SMALL.im_end_id]]


def test_prompt_and_completion_in_both_forms() -> None:
    strings = read_conversation({"prompt": "2 + 2?", "completion": "4"})
    lists = {"prompt": [turn("user", "2 + 2?")], "completion": [turn("assistant", "4")]}
    assert strings == read_conversation(lists)
    assert strings == Conversation((Message(USER, "2 + 2?"), Message(ASSISTANT, "4")), 1)


def test_assistant_turns_of_the_prompt_are_context() -> None:
    prompt = [turn("user", "a"), turn("assistant", "b"), turn("user", "c")]
    tokens = encode_chat(read_conversation({"prompt": prompt, "completion": "d"}), SMALL)
    assert sum(tokens.loss_mask) == len(SMALL.encode("d")) + 1


def covered_text(row: dict) -> str:
    tokens = encode_chat(read_conversation(row), SMALL)
    return SMALL.decode(
        [i for i, covered in zip(tokens.ids, tokens.loss_mask, strict=True) if covered]
    )


@pytest.mark.parametrize("flag", LOSS_FLAGS)
@pytest.mark.parametrize(("no", "yes"), [(0, 1), (False, True), (0.0, 1.0), (0, None)])
def test_flag_of_a_message_excludes_it_from_the_loss(flag: str, no, yes) -> None:
    wrong = {**turn("assistant", "WRONG"), flag: no}
    right = {**turn("assistant", "right"), flag: yes}
    messages = [turn("user", "q"), wrong, {**turn("user", "q"), flag: yes}, right]
    assert covered_text({"messages": messages}) == "right<|im_end|>"
    completion = {"prompt": "q", "completion": messages[1:]}
    assert covered_text(completion) == "right<|im_end|>"
    assert covered_text({"messages": [turn("user", "q"), right]}) == "right<|im_end|>"
    with pytest.raises(DataError, match="no assistant turn in the loss"):
        read_conversation({"messages": [turn("user", "q"), wrong]})


@pytest.mark.parametrize("flag", LOSS_FLAGS)
@pytest.mark.parametrize("value", [0.5, 2, -1, "0", "false", [0], [0, 1, 1], float("nan")])
def test_flag_of_another_value_is_refused_with_its_place(flag: str, value) -> None:
    flagged = {**turn("assistant", "x"), flag: value}
    with pytest.raises(DataError, match=rf"messages\[1\] has {flag} .*; expected 0, 1, false or "):
        read_conversation({"messages": [turn("user", "q"), flagged]})


def test_flags_that_contradict_each_other_are_refused() -> None:
    flagged = {**turn("assistant", "x"), "weight": 1, "trainable": False}
    with pytest.raises(DataError, match=r"messages\[0\] has weight and trainable that contradict"):
        read_conversation({"messages": [flagged]})


def test_flags_of_a_preference_row() -> None:
    draft = {**turn("assistant", "draft"), "weight": 0}
    chosen, rejected = [draft, turn("assistant", "good")], [draft, turn("assistant", "bad")]
    pair = read_preference({"prompt": "q", "chosen": chosen, "rejected": rejected})
    assert [pair.conversations()[0].is_in_loss(index) for index in range(3)] == [False, False, True]
    flagged = {**turn("assistant", "good"), "weight": 0}
    for row, message in (
        ({"chosen": [flagged], "rejected": "bad"}, "flags exclude all turns of the answer"),
        ({"chosen": [flagged], "rejected": "good"}, "are equal"),
    ):
        with pytest.raises(DataError, match=message):
            read_preference({"prompt": "q", **row})


def test_preference_rows_in_all_forms() -> None:
    strings = {"prompt": "q", "chosen": "good", "rejected": "bad"}
    lists = {name: [turn("assistant", strings[name])] for name in ("chosen", "rejected")}
    question = [turn("user", "q")]
    implicit = {name: question + messages for name, messages in lists.items()}
    pair = read_preference(strings)
    assert pair == read_preference({"prompt": question, **lists}) == read_preference(implicit)
    chosen, rejected = pair.conversations()
    assert chosen == Conversation((Message(USER, "q"), Message(ASSISTANT, "good")), 1)
    assert rejected.messages[1].content == "bad" and rejected.first_with_loss == 1


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": [turn("tool", "x")]}, r"messages\[0\] has role 'tool'; expected system, "),
        ({"messages": [{"role": ["user"], "content": ""}]}, r"has role \['user'\]"),
        ({"messages": [turn("User", "x")]}, "has role 'User'"),
        ({"messages": [{"role": "user"}]}, r"messages\[0\] is .* expected"),
        ({"messages": [turn("user", None)]}, r"messages\[0\] is .* expected"),
        ({"messages": "hello"}, "expected a list of messages"),
        ({"messages": []}, "expected a list of messages"),
        ({"messages": [turn("user", "x")]}, "no assistant turn in the loss"),
        ({"prompt": [turn("assistant", "x")], "completion": [turn("user", "y")]}, "no assistant"),
        ({"prompt": "x"}, "has columns prompt; expected `messages`"),
        ({"messages": [turn("assistant", "\ud800")]}, "lone surrogate at character 0"),
        ({"messages": [turn("assistant", "x")], "tools": [{}]}, "uses `tools`"),
        ({"messages": [{**turn("assistant", ""), "tool_calls": [1]}]}, "uses `tool_calls`"),
    ],
)
def test_malformed_chat_row_is_one_clear_line(row, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        read_conversation(row)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "q", "chosen": "a"}, "has columns chosen, prompt; expected"),
        ({"prompt": "q", "chosen": "a", "rejected": "a"}, "are equal"),
        ({"chosen": "a", "rejected": "b"}, "no prompt"),
        ({"prompt": "q", "chosen": "a", "rejected": [turn("user", "b")]}, "rejected must end"),
        ({"prompt": "q", "chosen": 3, "rejected": "b"}, "chosen is 3; expected a string or"),
    ],
)
def test_malformed_preference_row_is_one_clear_line(row, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_preference(row)
