"""Parse rows of conversations: `messages`, or `prompt` and `completion`."""

from collections.abc import Mapping

from phi4.data.rows.messages import (
    column_names,
    end_of_prompt,
    read_messages,
    read_side,
    refuse_tools,
    require_answers,
)
from phi4.data.vocabulary.chat import Conversation, Role
from phi4.errors import DataError

CONVERSATION = "messages"
"""Name that selects the conversation of a row, whatever its columns are."""
CONVERSATION_COLUMNS = (CONVERSATION, "prompt", "completion")


def read_conversation(row: Mapping[str, object]) -> Conversation:
    """Parse the conversation of a training row with TRL's column names.

    Args:
        row: `messages`, a list of `{"role", "content"}`; or `prompt` and `completion`, each a
            string (a user's and an assistant's turn) or such a list. The loss covers the completion
            only; a prompt that the completion repeats is read once. A message may carry one of the
            flags in `LOSS_FLAGS`: 0 or false excludes an assistant turn from the loss, 1 or true
            includes it. Other turns are never included.

    Raises:
        DataError: the columns are missing or malformed, a role or the value of a flag is unknown,
            no turn is in the loss, or one that is in the loss is empty.
    """
    refuse_tools(row)
    if CONVERSATION in row:
        conversation = Conversation(read_messages(row[CONVERSATION], CONVERSATION))
    elif "prompt" in row and "completion" in row:
        conversation = _completed(row["prompt"], row["completion"])
    else:
        raise DataError(
            f"chat row has columns {column_names(row)}; expected `messages`, or `prompt` and "
            "`completion`"
        )
    if not conversation.has_loss:
        raise DataError("chat row has no assistant turn in the loss; add one or remove the row")
    check_answers(conversation, "chat row")
    return conversation


def check_answers(conversation: Conversation, place: str) -> None:
    """Raise an error for a conversation with an empty answer.

    Raises:
        DataError: a turn in the loss is empty or white space.
    """
    messages = conversation.messages
    covered = [conversation.is_in_loss(index) for index in range(len(messages))]
    require_answers(messages, covered, place)


def _completed(prompt_value: object, completion_value: object) -> Conversation:
    prompt = read_side(prompt_value, "prompt", Role.USER)
    completion = read_side(completion_value, "completion", Role.ASSISTANT)
    if end := end_of_prompt(prompt, completion):
        return Conversation(completion, end)
    if prompt[-1].role is Role.USER and completion[0].role is not Role.ASSISTANT:
        raise DataError(
            f"chat row: completion begins with a {completion[0].role} turn and does not repeat the "
            "prompt; begin it with the assistant's answer"
        )
    return Conversation(prompt + completion, len(prompt))
