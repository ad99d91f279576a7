"""`POST /v1/completions`: its body, and the corresponding requests."""

from collections.abc import Sequence
from typing import Annotated

from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError

from phi4.sampling.protocol import Request
from phi4.serve.openai_api.request_fields import MAX_TOP_LOG_PROBS, SamplingFields, encoded
from phi4.serve.openai_api.supported import refuse
from phi4.serve.served_model import ServedModel

_DEFAULT_MAX_TOKENS = 16
"""OpenAI's."""


def _prompts(value: object) -> list[str | list[int]]:
    """Return a list of texts or of lists of ids, from the four forms of a prompt."""
    if isinstance(value, str) or (isinstance(value, list) and _are_ids(value)):
        return [value]
    if isinstance(value, list) and value:
        if all(isinstance(one, str) for one in value):
            return value
        if all(isinstance(one, list) and _are_ids(one) for one in value):
            return value
    raise PydanticCustomError(
        "prompt", "Input should be a text, a list of texts, token ids, or a list of such lists"
    )


def _are_ids(value: Sequence[object]) -> bool:
    """Return whether these are integers (not bools), and at least one."""
    return bool(value) and all(type(one) is int for one in value)


class CompletionRequest(SamplingFields):
    """The body."""

    prompt: Annotated[list[str | list[int]], BeforeValidator(_prompts)]
    max_tokens: int | None = Field(None, ge=0)
    logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOG_PROBS)
    echo: bool = False
    best_of: int | None = None

    def requests(self, model: ServedModel) -> tuple[Request, ...]:
        """Return one request per prompt.

        Raises:
            ApiError: 400.
        """
        self.check(len(self.prompt), self.logprobs is not None)
        if self.best_of not in (None, self.n):
            refuse("best_of", self.best_of)
        return tuple(self._request(model, prompt) for prompt in self.prompt)

    def _request(self, model: ServedModel, prompt: str | list[int]) -> Request:
        ids = encoded(model, prompt, "prompt") if isinstance(prompt, str) else tuple(prompt)
        max_tokens = self.max_tokens
        if max_tokens is None:
            max_tokens = min(_DEFAULT_MAX_TOKENS, model.max_tokens(None, len(ids)))
        return self.request(
            model,
            ids,
            max_tokens,
            num_top_log_probs=self.logprobs,
            prompt_log_probs=self.echo and (self.logprobs is not None or max_tokens == 0),
        )
