"""Parse the messages of a row: roles, contents and the flags that select turns for the loss.

A message is either a turn of phi-4's chat format or an error with its position. Nothing is renamed
or dropped.
"""

from collections.abc import Mapping, Sequence

from phi4.data.vocabulary.chat import Message, Role
from phi4.errors import DataError

LOSS_FLAGS = ("weight", "loss", "loss_mask", "trainable", "train")
"""Keys of a message that include it in or exclude it from the loss: OpenAI's, Swift's, verl's,
Axolotl's."""


def read_messages(value: object, place: str) -> tuple[Message, ...]:
    """Parse turns of a row: a list of `{"role", "content"}`.

    Raises:
        DataError: it is not such a list, or a role or the value of a flag is unknown.
    """
    return _messages(value, place, "a list of messages")


def read_side(value: object, column: str, role: Role) -> tuple[Message, ...]:
    """Parse turns of a column that may be a string, which is one turn of the given role.

    Raises:
        DataError: it is neither a string nor a list of messages, or as in `read_messages`.
    """
    if isinstance(value, str):
        return (Message(role, _encodable(value, column)),)
    return _messages(value, column, "a string or a list of messages")


def spoken(messages: Sequence[Message]) -> list[tuple[Role, str]]:
    """Return messages without their flags."""
    return [(message.role, message.content) for message in messages]


def end_of_prompt(prompt: Sequence[Message], side: Sequence[Message]) -> int:
    """Return the index after the prompt in an answer that repeats it; 0 if it does not.

    Many data sets have the prompt in its own column and again at the beginning of an answer,
    sometimes with a system turn or earlier turns before it.
    """
    said, wanted = ([(role, text.strip()) for role, text in spoken(m)] for m in (side, prompt))
    places = range(len(said) - len(wanted) + 1)
    first = next((i for i in places if said[i : i + len(wanted)] == wanted), None)
    if first is None or (first > 0 and side[0].role is Role.ASSISTANT):
        return 0
    return first + len(wanted)


def require_answers(messages: Sequence[Message], is_covered: Sequence[bool], place: str) -> None:
    """Raise an error for empty turns in the loss, which would train a model to answer nothing.

    Args:
        messages: messages of a conversation.
        is_covered: whether each of them is in the loss.
        place: identifies them in the error.

    Raises:
        DataError: a turn in the loss is empty or white space.
    """
    for index, (message, covered) in enumerate(zip(messages, is_covered, strict=True)):
        if covered and not message.content.strip():
            raise DataError(
                f"{place} has an empty answer: turn {index} is {shown(message.content)}; remove "
                f"the row, or exclude the turn from the loss with weight 0"
            )


def refuse_tools(value: Mapping[str, object]) -> None:
    """Raise an error for a row or message that uses tools.

    Raises:
        DataError: it uses tools.
    """
    for name in ("tools", "tool_calls"):
        if value.get(name):
            raise DataError(
                f"chat row uses `{name}`, which phi-4's format does not have; remove it"
            )


def column_names(row: Mapping[str, object]) -> str:
    """Return the columns of a row, for an error."""
    return ", ".join(sorted(map(str, row))) or "none"


def shown(value: object) -> str:
    """Return a value, shortened, for an error."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _messages(value: object, column: str, forms: str) -> tuple[Message, ...]:
    if not isinstance(value, Sequence) or isinstance(value, str | bytes) or not value:
        raise DataError(f"chat column {column} is {shown(value)}; expected {forms}")
    return tuple(_message(item, f"{column}[{index}]") for index, item in enumerate(value))


def _message(value: object, place: str) -> Message:
    if not isinstance(value, Mapping) or not isinstance(value.get("content"), str):
        raise DataError(
            f'chat {place} is {shown(value)}; expected {{"role": ..., "content": "text"}}'
        )
    refuse_tools(value)
    role = value.get("role")
    # `in Role` raises for values that are not strings before Python 3.12.
    if role not in tuple(Role):
        raise DataError(
            f"chat {place} has role {shown(role)}; expected {', '.join(Role)}: rename the role or "
            f"remove the row"
        )
    return Message(Role(role), _encodable(value["content"], place), _trainable(value, place))


def _trainable(message: Mapping[str, object], place: str) -> bool:
    """Return the value of a message's flags; True without any. Parquet has None for absent keys."""
    flags = {name: message[name] for name in LOSS_FLAGS if message.get(name) is not None}
    for name, value in flags.items():
        # 0.0 and 1.0 are how pandas stores a column of integers with gaps.
        if not isinstance(value, int | float) or value not in (0, 1):
            raise DataError(
                f"chat {place} has {name} {shown(value)}; expected 0, 1, false or true: fractional "
                f"weights are not supported"
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
            f"chat {place} has a lone surrogate at character {error.start}; correct the text"
        ) from None
    return content
