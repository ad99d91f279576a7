"""Conversations as token ids, for the prompts of requests.

An answer goes into the next prompt as the sampled ids, never as text that is encoded again. The
prompts of a conversation are thus prefixes of each other, whose keys and values a sampler computes
once, and `<|im_end|>` typed by a user stays text.
"""

from collections.abc import Sequence

from phi4.data.vocabulary.chat import Conversation, Message, Role, encode_chat, turn_header
from phi4.data.vocabulary.tokenizer import Tokenizer
from phi4.errors import DataError


def chat_prompt(messages: Sequence[Message], tokenizer: Tokenizer) -> tuple[int, ...]:
    """Return the ids of some turns and of the assistant header to complete."""
    return tuple(encode_chat(Conversation(tuple(messages)), tokenizer, True).ids)


def next_prompt(
    prompt: Sequence[int], answer: Sequence[int], message: Message, tokenizer: Tokenizer
) -> tuple[int, ...]:
    """Return the prompt of the turn after next: the answer, closed, and the new message.

    Args:
        prompt: ids from `chat_prompt` or this function.
        answer: the ids sampled for it, with or without the end token.
        message: the new turn.
        tokenizer: tokenizer of the ids.
    """
    ended = bool(answer) and answer[-1] in (tokenizer.im_end_id, tokenizer.eod_id)
    said = answer[:-1] if ended else answer
    return (*prompt, *said, tokenizer.im_end_id, *chat_prompt((message,), tokenizer))


def read_chat_prompt(ids: Sequence[int], tokenizer: Tokenizer) -> tuple[Message, ...]:
    """Parse a `chat_prompt` into turns, for a server that accepts messages.

    Raises:
        DataError: the ids are not a chat prompt, or a turn has no text representation.
    """
    header = chat_prompt((), tokenizer)
    if tuple(ids[len(ids) - len(header) :]) != header:
        raise DataError(
            "the prompt is not a conversation: it does not end with the header of an assistant "
            "turn; create it with chat_prompt"
        )
    rest, messages = list(ids[: len(ids) - len(header)]), []
    while rest:
        if tokenizer.im_end_id not in rest:
            raise DataError("the prompt's last turn has no end; create it with chat_prompt")
        end = rest.index(tokenizer.im_end_id)
        messages.append(_read_turn(rest[:end], tokenizer))
        rest = rest[end + 1 :]
    return tuple(messages)


def _read_turn(ids: list[int], tokenizer: Tokenizer) -> Message:
    for role in Role:
        header = turn_header(role, tokenizer)
        if ids[: len(header)] == header:
            return Message(role, plain_text(ids[len(header) :], tokenizer))
    raise DataError(
        f"the prompt has a turn without a role of phi-4 ({', '.join(Role)}); create it with "
        f"chat_prompt"
    )


def plain_text(ids: Sequence[int], tokenizer: Tokenizer) -> str:
    """Return text that encodes ids without loss.

    Raises:
        DataError: they include a special token, or their bytes are not text.
    """
    special = set(tokenizer.special_tokens.values()).intersection(ids)
    if special:
        name = tokenizer.bytes_of(min(special)).decode()
        raise DataError(
            f"the special token {name} cannot be written as text; remove it, or use an endpoint "
            f"that accepts token ids"
        )
    try:
        return b"".join(map(tokenizer.bytes_of, ids)).decode()
    except UnicodeDecodeError:
        raise DataError(
            "the ids are not UTF-8 and cannot be written as text; use an endpoint that accepts "
            "token ids"
        ) from None
