"""Reconstruct the conversation before an answer from the ids of its prompt."""

from phi4.data.vocabulary.chat import Message, Role
from phi4.data.vocabulary.tokenizer import Tokenizer
from phi4.errors import DataError
from phi4.pts.answers import AnswerRow
from phi4.sampling.chat import plain_text, read_chat_prompt


def turns_of(row: AnswerRow, tokenizer: Tokenizer) -> tuple[Message, ...]:
    """Return the turns before an answer; a prompt that is not a conversation is one user turn.

    Args:
        row: an answer.
        tokenizer: tokenizer of its ids.

    Raises:
        DataError: the ids are of another tokenizer, or have no text.
    """
    _check_tokenizer(row, tokenizer)
    try:
        if tokenizer.im_sep_id in row.prompt_ids:
            return read_chat_prompt(row.prompt_ids, tokenizer)
        return (Message(Role.USER, row.prompt or plain_text(row.prompt_ids, tokenizer)),)
    except DataError as error:
        raise DataError(f"question {row.question!r}: {error}") from None


def _check_tokenizer(row: AnswerRow, tokenizer: Tokenizer) -> None:
    longest = max((*row.prompt_ids, *row.ids), default=0)
    if longest >= tokenizer.vocab_size or not tokenizer.decode(row.ids).startswith(row.text):
        raise DataError(
            f"the answers to question {row.question!r} have ids of another tokenizer; give the "
            f"rank file of the model that answered with --ranks"
        )
