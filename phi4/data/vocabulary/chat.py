"""phi-4's chat format, built from token ids: a conversation is encoded to ids and a loss mask.

Content is never parsed for special tokens. Each turn is `CHAT_FORMAT` with its parts joined as ids,
so `<|im_end|>` typed by a user is text and not the end of a turn.
"""

import hashlib
import re
from dataclasses import dataclass
from enum import StrEnum

from phi4.data.vocabulary.tokenizer import Tokenizer

CHAT_FORMAT = "<|im_start|>{role}<|im_sep|>{content}<|im_end|>"
"""One turn. A conversation is its turns concatenated, with nothing between them."""

_SPECIAL_TOKEN = re.compile(r"(<\|[a-z0-9_]+\|>)")


def chat_template_sha256() -> str:
    """Return the sha256 of the format that `encode_chat` writes, as stored in manifests of token
    files."""
    return hashlib.sha256(CHAT_FORMAT.encode()).hexdigest()


class Role(StrEnum):
    """Role of a turn; phi-4 has no other roles."""

    SYSTEM = "system"
    USER = "user"
    ASSISTANT = "assistant"


@dataclass(frozen=True)
class Message:
    """One turn."""

    role: Role
    content: str
    trainable: bool = True
    """Whether its own flag, if it has one, includes it in the loss; only for assistant turns."""


@dataclass(frozen=True)
class Conversation:
    """Turns, and the first message from which assistant turns are in the loss."""

    messages: tuple[Message, ...]
    first_with_loss: int = 0
    """Index of a message; assistant turns before it are context, as in a `prompt`."""

    def is_in_loss(self, index: int) -> bool:
        """Return whether a message is in the loss."""
        message = self.messages[index]
        return (
            message.role is Role.ASSISTANT and message.trainable and index >= self.first_with_loss
        )

    @property
    def has_loss(self) -> bool:
        """Return whether any message is in the loss."""
        return any(map(self.is_in_loss, range(len(self.messages))))


@dataclass(frozen=True)
class ChatTokens:
    """A conversation in ids.

    Attributes:
        ids: token ids.
        loss_mask: same length; True where the token, as a label, has loss weight 1.
    """

    ids: list[int]
    loss_mask: list[bool]


def encode_chat(
    conversation: Conversation, tokenizer: Tokenizer, add_generation_prompt: bool = False
) -> ChatTokens:
    """Encode a conversation in phi-4's format, with the assistant-only loss mask.

    The loss covers the content of assistant turns and the `<|im_end|>` that closes them, except
    where a turn's own flag excludes it; it never covers headers or turns of other roles.

    Args:
        conversation: read from a row, or built by the caller.
        tokenizer: any vocabulary; the special tokens have the same names in each.
        add_generation_prompt: append the header of an assistant turn for the model to complete.
    """
    ids: list[int] = []
    loss_mask: list[bool] = []
    ending = _format_ids(CHAT_FORMAT.partition("{content}")[2], tokenizer)
    for index, message in enumerate(conversation.messages):
        header = turn_header(message.role, tokenizer)
        body = [*tokenizer.encode(message.content), *ending]
        ids += header + body
        loss_mask += [False] * len(header) + [conversation.is_in_loss(index)] * len(body)
    if add_generation_prompt:
        header = turn_header(Role.ASSISTANT, tokenizer)
        ids += header
        loss_mask += [False] * len(header)
    return ChatTokens(ids, loss_mask)


def turn_header(role: Role, tokenizer: Tokenizer) -> list[int]:
    """Return the ids before the content of a turn."""
    header = CHAT_FORMAT.partition("{content}")[0]
    return _format_ids(header.replace("{role}", role), tokenizer)


def _format_ids(text: str, tokenizer: Tokenizer) -> list[int]:
    """Return the ids of a part of the format, in which names of special tokens are these tokens."""
    ids: list[int] = []
    for piece in filter(None, _SPECIAL_TOKEN.split(text)):
        special = tokenizer.special_tokens.get(piece)
        ids += tokenizer.encode(piece) if special is None else [special]
    return ids
