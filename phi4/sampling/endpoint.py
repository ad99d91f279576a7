"""Where a model answers over HTTP, and in which form it is asked."""

from dataclasses import dataclass, field
from enum import StrEnum


class PromptForm(StrEnum):
    """How prompt and answer travel.

    `phi4` is for `phi4 serve`, whose extensions do all that a `Request` can ask for. `ids` needs
    vLLM's extensions `return_token_ids` and `return_tokens_as_token_ids`. The other two work
    everywhere; the ids of their completions are an encoding of the server's text, piece by piece,
    and max_tokens counts those.
    """

    PHI4 = "phi4"
    IDS = "ids"
    TEXT = "text"
    CHAT = "chat"

    @property
    def is_in_ids(self) -> bool:
        """Whether prompt and answer are token ids."""
        return self in (PromptForm.PHI4, PromptForm.IDS)


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """Where a model answers.

    Attributes:
        base_url: up to and with `/v1`.
        model: its name there.
        form: how prompt and answer travel.
        api_key: sent as a bearer token.
        timeout_seconds: of connecting, and of the silence between two pieces.
        max_connections: requests that are open at once; the others wait.
    """

    base_url: str
    model: str
    form: PromptForm
    api_key: str | None = field(default=None, repr=False)
    timeout_seconds: float = 600.0
    max_connections: int = 16
