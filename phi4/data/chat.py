"""phi-4's chat format, built in id space: a conversation in, ids and what is learnt of them out.

The one decision: content never meets the parser of special tokens. Each turn is
`<|im_start|> role <|im_sep|> content <|im_end|>` with the four parts put together as ids, no line
breaks between them, so `<|im_end|>` typed by a user is text and not the end of a turn.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from phi4.data.tokenizer import Tokenizer
from phi4.errors import DataError


class Role(StrEnum):
    """Who speaks; phi-4 has no other roles."""

    SYSTEM = "system"
    USER = "user"
    ASSISTANT = "assistant"


@dataclass(frozen=True)
class Message:
    """One turn."""

    role: Role
    content: str


@dataclass(frozen=True)
class Conversation:
    """Turns, and from which on the assistant's are learnt."""

    messages: tuple[Message, ...]
    first_learnt: int = 0
    """Index of a message; assistant turns before it are context, as in a `prompt`."""


@dataclass(frozen=True)
class PreferencePair:
    """A context and two continuations of it."""

    prompt: tuple[Message, ...]
    chosen: tuple[Message, ...]
    rejected: tuple[Message, ...]

    def conversations(self) -> tuple[Conversation, Conversation]:
        """The chosen and the rejected one, both learnt from the end of the prompt on."""
        start = len(self.prompt)
        chosen = Conversation(self.prompt + self.chosen, start)
        return chosen, Conversation(self.prompt + self.rejected, start)


@dataclass(frozen=True)
class ChatTokens:
    """A conversation in ids.

    Attributes:
        ids: token ids.
        learnt: equally long; True where the token, as a label, has loss weight 1.
    """

    ids: list[int]
    learnt: list[bool]


def encode_chat(
    conversation: Conversation, tokenizer: Tokenizer, add_generation_prompt: bool = False
) -> ChatTokens:
    """Ids of a conversation in phi-4's format, and the assistant-only loss mask.

    Learnt are the content of assistant turns and the `<|im_end|>` that closes them; headers and the
    turns of others never are.

    Args:
        conversation: what `read_conversation` returns, or turns of one's own.
        tokenizer: any vocabulary; the special tokens have the same names in each.
        add_generation_prompt: append the header of an assistant turn for the model to go on from.
    """
    ids: list[int] = []
    learnt: list[bool] = []
    for index, message in enumerate(conversation.messages):
        header = _header(message.role, tokenizer)
        body = [*tokenizer.encode(message.content), tokenizer.im_end_id]
        is_learnt = message.role is Role.ASSISTANT and index >= conversation.first_learnt
        ids += header + body
        learnt += [False] * len(header) + [is_learnt] * len(body)
    if add_generation_prompt:
        header = _header(Role.ASSISTANT, tokenizer)
        ids += header
        learnt += [False] * len(header)
    return ChatTokens(ids, learnt)


def read_conversation(row: Mapping[str, object]) -> Conversation:
    """The conversation of a training row with TRL's column names.

    Args:
        row: `messages`, a list of `{"role", "content"}`; or `prompt` and `completion`, each a
            string (a user's and an assistant's turn) or such a list. Only the completion is learnt.

    Raises:
        DataError: the columns are missing or malformed, a role is unknown, or no assistant turn is
            there to be learnt.
    """
    _refuse_tools(row)
    if "messages" in row:
        conversation = Conversation(_turns(row["messages"], "messages", None))
    elif "prompt" in row and "completion" in row:
        prompt = _turns(row["prompt"], "prompt", Role.USER)
        completion = _turns(row["completion"], "completion", Role.ASSISTANT)
        conversation = Conversation(prompt + completion, len(prompt))
    else:
        raise DataError(
            f"chat row has columns {_names(row)}; expected `messages`, or `prompt` and `completion`"
        )
    learnable = conversation.messages[conversation.first_learnt :]
    if not any(message.role is Role.ASSISTANT for message in learnable):
        raise DataError("chat row has no assistant turn to learn; add one or leave the row out")
    return conversation


def read_preference(row: Mapping[str, object]) -> PreferencePair:
    """The pair of a preference row with TRL's column names.

    Args:
        row: `prompt`, `chosen` and `rejected`, each a string or a list of messages. Without
            `prompt`, two lists of messages share it as their common beginning.

    Raises:
        DataError: the columns are missing or malformed, a role is unknown, an answer does not end
            with an assistant turn, or the two are equal.
    """
    _refuse_tools(row)
    if "chosen" not in row or "rejected" not in row:
        raise DataError(
            f"preference row has columns {_names(row)}; expected `prompt`, `chosen`, `rejected`"
        )
    chosen, rejected = (_turns(row[name], name, Role.ASSISTANT) for name in ("chosen", "rejected"))
    if "prompt" in row:
        prompt = _turns(row["prompt"], "prompt", Role.USER)
    else:
        prompt, chosen, rejected = _split_common(chosen, rejected)
    if chosen == rejected:
        raise DataError("preference row: chosen and rejected are equal; leave the row out")
    for name, answer in (("chosen", chosen), ("rejected", rejected)):
        if not answer or answer[-1].role is not Role.ASSISTANT:
            raise DataError(f"preference row: {name} must end with an assistant turn; add it")
    if not prompt:
        raise DataError("preference row has no prompt; add `prompt` or common first messages")
    return PreferencePair(prompt, chosen, rejected)


def _header(role: Role, tokenizer: Tokenizer) -> list[int]:
    return [tokenizer.im_start_id, *tokenizer.encode(role), tokenizer.im_sep_id]


def _turns(value: object, column: str, string_role: Role | None) -> tuple[Message, ...]:
    if isinstance(value, str) and string_role is not None:
        return (Message(string_role, _encodable(value, column)),)
    if not isinstance(value, Sequence) or isinstance(value, str | bytes) or not value:
        forms = "a list of messages" if string_role is None else "a string or a list of messages"
        raise DataError(f"chat column {column} is {_shown(value)}; expected {forms}")
    return tuple(_message(item, f"{column}[{index}]") for index, item in enumerate(value))


def _message(value: object, place: str) -> Message:
    if not isinstance(value, Mapping) or not isinstance(value.get("content"), str):
        raise DataError(
            f'chat {place} is {_shown(value)}; expected {{"role": ..., "content": "text"}}'
        )
    _refuse_tools(value)
    role = value.get("role")
    # `in Role` raises for values that are no strings before Python 3.12.
    if role not in tuple(Role):
        raise DataError(
            f"chat {place} has role {_shown(role)}; phi-4 knows {', '.join(Role)}: rename the role "
            "or leave the row out"
        )
    return Message(Role(role), _encodable(value["content"], place))


def _encodable(content: str, place: str) -> str:
    try:
        content.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"chat {place} has a lone surrogate at character {error.start}; mend the text"
        ) from None
    return content


def _refuse_tools(value: Mapping[str, object]) -> None:
    for name in ("tools", "tool_calls"):
        if value.get(name):
            raise DataError(f"chat row uses `{name}`, which phi-4's format lacks; leave it out")


def _split_common(first: tuple[Message, ...], second: tuple[Message, ...]) -> tuple:
    same = next(
        (i for i, pair in enumerate(zip(first, second, strict=False)) if pair[0] != pair[1]),
        min(len(first), len(second)),
    )
    return first[:same], first[same:], second[same:]


def _names(row: Mapping[str, object]) -> str:
    return ", ".join(sorted(map(str, row))) or "none"


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
