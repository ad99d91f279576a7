"""`POST /v1/chat/completions`: its body, and the corresponding request."""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError

from phi4.data.vocabulary.chat import Message, Role
from phi4.errors import TokenizerError
from phi4.sampling.chat import chat_prompt
from phi4.sampling.protocol import Request
from phi4.serve.api_errors import bad_request
from phi4.serve.openai_api.request_fields import MAX_TOP_LOG_PROBS, Fields, SamplingFields
from phi4.serve.openai_api.supported import check_supported
from phi4.serve.served_model import ServedModel

_ROLES = {
    "system": Role.SYSTEM,
    "developer": Role.SYSTEM,
    "user": Role.USER,
    "assistant": Role.ASSISTANT,
}


def _text(value: object) -> object:
    """Return the text of a turn; parts are joined by line breaks, as in other servers."""
    if not isinstance(value, list):
        return value
    return "\n".join(map(_part, value))


def _part(part: object) -> str:
    match part:
        case {"type": "text", "text": str(text)}:
            return text
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    raise PydanticCustomError(
        "part", 'Parts should be {{"type": "text", "text": ...}}, not {kind}', {"kind": repr(kind)}
    )


class ChatMessage(Fields):
    """One turn."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, BeforeValidator(_text)]


class ChatRequest(SamplingFields):
    """The body."""

    messages: list[ChatMessage] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=MAX_TOP_LOG_PROBS)

    def requests(self, model: ServedModel) -> tuple[Request, ...]:
        """Return the request.

        Raises:
            ApiError: 400.
        """
        self.check(1, self.logprobs)
        for number, message in enumerate(self.messages):
            check_supported(message, f"messages.{number}.")
        if self.top_logprobs and not self.logprobs:
            raise bad_request("top_logprobs needs logprobs; set it to true", param="top_logprobs")
        prompt = self._prompt(model)
        num_top = self.top_logprobs if self.logprobs else None
        max_tokens = model.max_tokens(self._max_tokens(), len(prompt))
        return (self.request(model, prompt, max_tokens, num_top_log_probs=num_top),)

    def _max_tokens(self) -> int | None:
        """Return the limit from either of its two names."""
        old, new = self.max_tokens, self.max_completion_tokens
        if old is not None and new not in (None, old):
            raise bad_request(
                f"max_tokens={old} and max_completion_tokens={new} are the same limit; send one",
                param="max_tokens",
            )
        return old if new is None else new

    def _prompt(self, model: ServedModel) -> tuple[int, ...]:
        turns = [Message(_ROLES[turn.role], turn.content) for turn in self.messages]
        try:
            return chat_prompt(turns, model.tokenizer)
        except TokenizerError as error:
            raise bad_request(f"messages: {error}", param="messages") from None
