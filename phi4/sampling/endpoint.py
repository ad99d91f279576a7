"""The address of a model's HTTP endpoint, and the form of its requests."""

from dataclasses import dataclass, field
from enum import StrEnum


class PromptForm(StrEnum):
    """Form in which prompt and answer are sent.

    `phi4` is for `phi4 serve`, whose extensions support everything in a `Request`. `ids` needs
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
    """The endpoint of a model.

    Attributes:
        base_url: URL up to and including `/v1`.
        model: name of the model on the server.
        form: form of prompt and answer.
        api_key: sent as a bearer token.
        timeout_seconds: timeout of connecting, and between two pieces.
        max_connections: maximum number of open requests; others wait.
    """

    base_url: str
    model: str
    form: PromptForm
    api_key: str | None = field(default=None, repr=False)
    timeout_seconds: float = 600.0
    max_connections: int = 16
