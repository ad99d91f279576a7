"""phi-4's chat format, built in id space: a conversation in, ids and what is learnt of them out.

The one decision: content never meets the parser of special tokens. Each turn is
`<|im_start|> role <|im_sep|> content <|im_end|>` with the four parts put together as ids, no line
breaks between them, so `<|im_end|>` typed by a user is text and not the end of a turn.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from phi4.data.vocabulary.tokenizer import Tokenizer
from phi4.errors import DataError

LOSS_FLAGS = ("weight", "loss", "loss_mask", "trainable", "train")
"""Keys of a message that say whether the loss covers it: OpenAI's, Swift's, verl's, Axolotl's."""


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
    trainable: bool = True
    """Whether its own flag, if it has one, allows a loss; of assistant turns only."""


@dataclass(frozen=True)
class Conversation:
    """Turns, and from which on the assistant's are learnt."""

    messages: tuple[Message, ...]
    first_learnt: int = 0
    """Index of a message; assistant turns before it are context, as in a `prompt`."""

    def is_learnt(self, index: int) -> bool:
        """Whether the loss covers a message."""
        message = self.messages[index]
        return message.role is Role.ASSISTANT and message.trainable and index >= self.first_learnt

    @property
    def has_loss(self) -> bool:
        """Whether the loss covers any message."""
        return any(map(self.is_learnt, range(len(self.messages))))


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

    The loss covers the content of assistant turns and the `<|im_end|>` that closes them, except
    where a turn's own flag excludes it; it never covers headers or the turns of others.

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
        ids += header + body
        learnt += [False] * len(header) + [conversation.is_learnt(index)] * len(body)
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
            A message may carry one of the flags in `LOSS_FLAGS`: 0 or false excludes an assistant
            turn from the loss, 1 or true includes it. Other turns are never included.

    Raises:
        DataError: the columns are missing or malformed, a role or the value of a flag is unknown,
            or no assistant turn is left to learn.
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
    if not conversation.has_loss:
        raise DataError("chat row has no assistant turn to learn; add one or leave the row out")
    return conversation


def read_preference(row: Mapping[str, object]) -> PreferencePair:
    """The pair of a preference row with TRL's column names.

    Args:
        row: `prompt`, `chosen` and `rejected`, each a string or a list of messages. Without
            `prompt`, two lists of messages share it as their common beginning.

    Raises:
        DataError: the columns are missing or malformed, a role or the value of a flag is unknown,
            an answer does not end with an assistant turn or has none to learn, or the two are
            equal.
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
    if _spoken(chosen) == _spoken(rejected):
        raise DataError("preference row: chosen and rejected are equal; leave the row out")
    for name, answer in (("chosen", chosen), ("rejected", rejected)):
        if not answer or answer[-1].role is not Role.ASSISTANT:
            raise DataError(f"preference row: {name} must end with an assistant turn; add it")
    if not prompt:
        raise DataError("preference row has no prompt; add `prompt` or common first messages")
    pair = PreferencePair(prompt, chosen, rejected)
    if not all(conversation.has_loss for conversation in pair.conversations()):
        raise DataError("preference row: flags exclude a whole answer; leave the row out")
    return pair


def read_messages(value: object, place: str) -> tuple[Message, ...]:
    """Turns of a row that is to be answered: a list of `{"role", "content"}`.

    Raises:
        DataError: it is no such list, or a role is unknown.
    """
    return _turns(value, place, None)


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
    return Message(Role(role), _encodable(value["content"], place), _trainable(value, place))


def _trainable(message: Mapping[str, object], place: str) -> bool:
    """What the flags of a message say; True without any. Parquet gives absent keys as None."""
    flags = {name: message[name] for name in LOSS_FLAGS if message.get(name) is not None}
    for name, value in flags.items():
        # 0.0 and 1.0 are what a column of integers with gaps turns into in pandas.
        if not isinstance(value, int | float) or value not in (0, 1):
            raise DataError(
                f"chat {place} has {name} {_shown(value)}; expected 0, 1, false or true: a turn "
                "is in the loss or not, fractions are not supported"
            )
    if len(set(map(bool, flags.values()))) > 1:
        raise DataError(
            f"chat {place} has {' and '.join(flags)} that contradict each other; keep one of them"
        )
    return all(flags.values())


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
    pairs = enumerate(zip(_spoken(first), _spoken(second), strict=False))
    same = next((i for i, (a, b) in pairs if a != b), min(len(first), len(second)))
    return first[:same], first[same:], second[same:]


def _spoken(messages: tuple[Message, ...]) -> list[tuple[Role, str]]:
    """Messages without their flags."""
    return [(message.role, message.content) for message in messages]


def _names(row: Mapping[str, object]) -> str:
    return ", ".join(sorted(map(str, row))) or "none"


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
