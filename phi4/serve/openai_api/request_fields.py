"""Common fields of completions and chat completions, and the corresponding `Request`.

Types are strict and null equals absent. The meaning of a field is defined by
`phi4.sampling.protocol.Request`, whose checks every request passes as well.
"""

import secrets
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from phi4.errors import TokenizerError
from phi4.sampling.protocol import Request
from phi4.sampling.text import end_ids
from phi4.serve.api_errors import bad_request
from phi4.serve.openai_api.supported import check_supported
from phi4.serve.served_model import ServedModel

MAX_TOP_LOG_PROBS = 20

_MAX_CHOICES = 4096
_MAX_STOP_STRINGS = 64
_SEED_BITS = 63


def _as_list(value: object) -> object:
    """Accept a single item as a list; an empty text as none."""
    if value == "":
        return []
    return value if isinstance(value, list) else [value]


def _by_id(value: object) -> object:
    """Convert keys to ids, because JSON has texts for keys."""
    if not isinstance(value, dict):
        return value
    try:
        return {int(name): bias for name, bias in value.items()}
    except ValueError:
        raise PydanticCustomError("bias_keys", "The keys should be token ids") from None


class Fields(BaseModel):
    """A JSON object in which null equals absent."""

    model_config = ConfigDict(strict=True, extra="allow")

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        return {name: value for name, value in data.items() if value is not None}


class StreamOptions(Fields):
    """Settings of a stream."""

    include_usage: bool = False


class SamplingFields(Fields):
    """Sampling and streaming settings.

    `top_k`, `min_p`, `stop_token_ids`, `ignore_eos`, `return_token_ids` and
    `return_tokens_as_token_ids` are vLLM's extensions. Our own are `first_token_forced`, an id or
    several that every answer begins with; `first_tokens_forbidden`, ids that it does not begin
    with; and `sampled_logprobs`, the log-probs of the distribution that was sampled from, next to
    those of the model.
    """

    model: str
    n: int = Field(1, ge=1, le=_MAX_CHOICES)
    temperature: float = Field(1.0, ge=0)
    top_p: float = Field(1.0, gt=0, le=1)
    seed: int | None = None
    stop: Annotated[list[str], BeforeValidator(_as_list), Field(max_length=_MAX_STOP_STRINGS)] = []
    stream: bool = False
    stream_options: StreamOptions | None = None
    logit_bias: Annotated[dict[int, float], BeforeValidator(_by_id)] = {}
    top_k: int = Field(0, ge=-1)
    min_p: float = Field(0.0, ge=0, le=1)
    stop_token_ids: list[int] = []
    ignore_eos: bool = False
    return_token_ids: bool = False
    return_tokens_as_token_ids: bool = False
    first_token_forced: Annotated[list[int], BeforeValidator(_as_list)] = []
    first_tokens_forbidden: list[int] = []
    sampled_logprobs: bool = False

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with a count of its tokens."""
        return self.stream_options is not None and self.stream_options.include_usage

    def check(self, num_prompts: int, has_log_probs: bool) -> None:
        """Raise an error for unsupported or contradictory fields.

        Raises:
            ApiError: 400.
        """
        check_supported(self)
        if self.stream_options is not None:
            check_supported(self.stream_options, "stream_options.")
            if not self.stream:
                raise bad_request(
                    "stream_options is for streams; set stream to true or remove it",
                    param="stream_options",
                )
        if num_prompts * self.n > _MAX_CHOICES:
            raise bad_request(
                f"{num_prompts} prompts with n={self.n} are {num_prompts * self.n} choices; "
                f"expected at most {_MAX_CHOICES}",
                param="n",
            )
        if self.sampled_logprobs and not has_log_probs:
            raise bad_request("sampled_logprobs needs logprobs; set it", param="sampled_logprobs")

    def request(
        self,
        model: ServedModel,
        prompt: tuple[int, ...],
        max_tokens: int,
        *,
        num_top_log_probs: int | None,
        prompt_log_probs: bool = False,
    ) -> Request:
        """Return the request for the model.

        Args:
            model: the served model.
            prompt: token ids.
            max_tokens: new tokens.
            num_top_log_probs: None for no log-probs at all.
            prompt_log_probs: whether the prompt is scored.

        Raises:
            ApiError: 400, if the model cannot answer it.
        """
        ends = frozenset[int]() if self.ignore_eos else end_ids(model.tokenizer)
        return model.checked(
            Request(
                prompt=prompt,
                max_tokens=max_tokens,
                n=self.n,
                temperature=self.temperature,
                top_p=self.top_p,
                top_k=max(self.top_k, 0),
                min_p=self.min_p,
                seed=secrets.randbits(_SEED_BITS) if self.seed is None else self.seed,
                forced=tuple(self.first_token_forced),
                forbidden_first=frozenset(self.first_tokens_forbidden),
                logit_bias=self.logit_bias,
                stop_ids=ends | frozenset(self.stop_token_ids),
                stop_strings=tuple(map(_stop_bytes, self.stop)),
                log_probs=num_top_log_probs is not None,
                num_top_log_probs=num_top_log_probs or 0,
                prompt_log_probs=prompt_log_probs,
            )
        )


def _stop_bytes(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise bad_request(f"stop: {error}; remove it", param="stop") from None


def encoded(model: ServedModel, text: str, param: str) -> tuple[int, ...]:
    """Encode a text without a prefix; names of special tokens in it are text.

    Raises:
        ApiError: 400, if it cannot be split into tokens.
    """
    try:
        return tuple(model.tokenizer.encode(text))
    except TokenizerError as error:
        raise bad_request(f"{param}: {error}", param=param) from None
