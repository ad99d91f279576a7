"""Request bodies of Ollama's API: accepted, ignored and rejected fields.

Unsupported features are rejected by name, so that no client relies on an option that is not
applied. Ollama's defaults are the defaults here, so that the same program behaves the same against
both.
"""

import re
import secrets
from abc import abstractmethod
from typing import Any, TypeVar

from fastapi import Request as HttpRequest
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from phi4.data.vocabulary.chat import Message, Role
from phi4.data.vocabulary.tokenizer import Tokenizer
from phi4.errors import TokenizerError
from phi4.sampling.chat import chat_prompt
from phi4.sampling.protocol import Request
from phi4.sampling.text import end_ids
from phi4.serve.api_errors import bad_request
from phi4.serve.served_model import ServedModel

WITHOUT_EFFECT = frozenset(
    (
        # How Ollama keeps a model in memory.
        *("keep_alive", "num_batch", "num_gpu", "main_gpu", "num_thread", "num_keep", "numa"),
        *("low_vram", "f16_kv", "use_mmap", "use_mlock"),
        # Settings of penalties and of mirostat, which are rejected themselves.
        *("repeat_last_n", "penalize_newline", "mirostat_tau", "mirostat_eta"),
        # Verbosity of /api/show.
        "verbose",
    )
)
"""Fields that affect no answer here; any value is accepted."""

NEUTRAL = {"repeat_penalty": 1.0, "tfs_z": 1.0, "typical_p": 1.0}
"""Options that are not supported, with the values at which Ollama does not apply them either."""

MOST_TOP_LOGPROBS = 20
_MOST_STOP_STRINGS = 64
_FILLS_THE_CONTEXT = (-1, -2)
_RANDOM_SEED = -1
_ALL_TOKENS = -1

_Body = TypeVar("_Body", bound="OllamaFields")


class OllamaFields(BaseModel):
    """Fields of a body; null equals absent, and unknown ones are kept."""

    model_config = ConfigDict(extra="allow", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, sent: Any) -> Any:
        if not isinstance(sent, dict):
            return sent
        return {name: value for name, value in sent.items() if value is not None}

    def refuse_unsupported(self, where: str = "") -> None:
        """Raise an error for unsupported fields, unless their value has no effect.

        Args:
            where: prefix of their names in the error.

        Raises:
            ApiError: 400, with the name of the first field.
        """
        for name, value in (self.model_extra or {}).items():
            if value and name not in WITHOUT_EFFECT and value != NEUTRAL.get(name):
                field, shown = where + name, repr(value)[:100]
                raise bad_request(
                    f"{field}={shown} is not supported by this server; remove {field}", field
                )


class OllamaOptions(OllamaFields):
    """Sampling options, with the defaults of Ollama's Modelfile.

    `ignore_eos` and `stop_token_ids` are extensions of this server.
    """

    temperature: float = 0.8
    top_p: float = 0.9
    top_k: int = 40
    min_p: float = 0.0
    seed: int = _RANDOM_SEED
    num_predict: int | None = None
    num_ctx: int = 0
    stop: tuple[str, ...] = Field(default=(), max_length=_MOST_STOP_STRINGS)
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()

    @field_validator("stop", mode="before")
    @classmethod
    def _as_list(cls, sent: Any) -> Any:
        """Accept a single stop string, and an empty one as none."""
        return ([sent] if sent else []) if isinstance(sent, str) else sent

    def max_tokens(self, model: ServedModel, num_prompt_tokens: int) -> int:
        """Return the requested number of new tokens.

        Raises:
            ApiError: 400 for an invalid number.
        """
        longest = model.limits.max_sequence_tokens
        if self.num_predict in _FILLS_THE_CONTEXT and longest is not None:
            return max(1, longest - num_prompt_tokens)
        if self.num_predict is None or self.num_predict in _FILLS_THE_CONTEXT:
            return model.max_tokens(None, num_prompt_tokens)
        if self.num_predict < 1:
            raise bad_request(
                f"options.num_predict={self.num_predict}; expected at least 1, or -1 for as many "
                "as the context holds",
                "options.num_predict",
            )
        return self.num_predict

    def check_context(self, model: ServedModel) -> None:
        """Raise an error for a context that the model does not have; a smaller one is allowed.

        Raises:
            ApiError: 400.
        """
        longest = model.limits.max_sequence_tokens
        if longest is not None and self.num_ctx > longest:
            raise bad_request(
                f"options.num_ctx={self.num_ctx}; but this model's context has {longest} tokens; "
                f"lower num_ctx or remove it",
                "options.num_ctx",
            )


class AskedFields(OllamaFields):
    """Common fields of /api/generate and /api/chat."""

    model: str
    stream: bool = True
    options: OllamaOptions = OllamaOptions()
    logprobs: bool = False
    top_logprobs: int = Field(default=0, ge=0, le=MOST_TOP_LOGPROBS)

    @property
    @abstractmethod
    def is_empty(self) -> bool:
        """Whether there is nothing to answer: Ollama then loads the model and reports it."""

    @abstractmethod
    def prompt_ids(self, tokenizer: Tokenizer) -> tuple[int, ...]:
        """Return the ids of the prompt.

        Raises:
            TokenizerError: it cannot be split into tokens.
        """

    def refuse_unsupported(self, where: str = "") -> None:
        """See `OllamaFields`; checks the options' fields too."""
        super().refuse_unsupported(where)
        self.options.refuse_unsupported(f"{where}options.")


class GenerateBody(AskedFields):
    """The body of /api/generate."""

    prompt: str = ""
    system: str = ""
    raw: bool = False

    @property
    def is_empty(self) -> bool:
        """See `AskedFields`."""
        return not self.prompt

    def prompt_ids(self, tokenizer: Tokenizer) -> tuple[int, ...]:
        """See `AskedFields`: the prompt is a user's turn, unless it is raw."""
        if self.raw:
            return raw_ids(self.prompt, tokenizer)
        system = [Message(Role.SYSTEM, self.system)] if self.system else []
        return chat_prompt([*system, Message(Role.USER, self.prompt)], tokenizer)

    def refuse_unsupported(self, where: str = "") -> None:
        """See `AskedFields`; a raw prompt cannot have `system`."""
        super().refuse_unsupported(where)
        if self.raw and self.system:
            raise bad_request("system cannot be used with a raw prompt; remove one of them", "raw")


class OllamaMessage(OllamaFields):
    """A turn of a conversation."""

    role: Role
    content: str = ""


class OllamaChatBody(AskedFields):
    """The body of /api/chat."""

    messages: tuple[OllamaMessage, ...] = ()

    @property
    def is_empty(self) -> bool:
        """See `AskedFields`."""
        return not self.messages

    def prompt_ids(self, tokenizer: Tokenizer) -> tuple[int, ...]:
        """See `AskedFields`: a final assistant message is continued, as in Ollama."""
        turns = [Message(one.role, one.content) for one in self.messages]
        if turns[-1].role is Role.ASSISTANT:
            begun = tokenizer.encode(turns[-1].content)
            return (*chat_prompt(turns[:-1], tokenizer), *begun)
        return chat_prompt(turns, tokenizer)

    def refuse_unsupported(self, where: str = "") -> None:
        """See `AskedFields`; checks the messages' fields too."""
        super().refuse_unsupported(where)
        for index, message in enumerate(self.messages):
            message.refuse_unsupported(f"messages.{index}.")


class ShowBody(OllamaFields):
    """The body of /api/show; old clients send the model as `name`."""

    model: str = ""
    name: str = ""


async def read_body(http: HttpRequest, form: type[_Body]) -> _Body:
    """Parse the body.

    The content type is ignored: curl sends that of web forms, as in Ollama's own examples.

    Raises:
        RequestValidationError: it is not in this format.
        ApiError: see `OllamaFields.refuse_unsupported`.
    """
    try:
        body = form.model_validate_json(await http.body())
    except ValidationError as error:
        raise RequestValidationError(error.errors()) from None
    body.refuse_unsupported()
    return body


def request_of(body: AskedFields, model: ServedModel) -> Request:
    """Return the request for the model.

    Args:
        body: a body that is not empty.
        model: the served model.

    Raises:
        ApiError: 400, if the model cannot answer it.
    """
    options = body.options
    options.check_context(model)
    if body.top_logprobs and not body.logprobs:
        raise bad_request(f"top_logprobs={body.top_logprobs} needs logprobs: true", "top_logprobs")
    try:
        prompt = body.prompt_ids(model.tokenizer)
    except TokenizerError as error:
        raise bad_request(str(error)) from None
    ends = frozenset() if options.ignore_eos else end_ids(model.tokenizer)
    request = Request(
        prompt=prompt,
        max_tokens=options.max_tokens(model, len(prompt)),
        temperature=options.temperature,
        top_p=options.top_p,
        top_k=0 if options.top_k == _ALL_TOKENS else options.top_k,
        min_p=options.min_p,
        seed=secrets.randbits(63) if options.seed == _RANDOM_SEED else options.seed,
        stop_ids=ends.union(options.stop_token_ids),
        stop_strings=tuple(text.encode() for text in options.stop),
        log_probs=body.logprobs,
        num_top_log_probs=body.top_logprobs,
    )
    return model.checked(request, "num_predict")


def raw_ids(text: str, tokenizer: Tokenizer) -> tuple[int, ...]:
    """Return the ids of a raw prompt: names of special tokens in it are these tokens."""
    names = "|".join(map(re.escape, tokenizer.special_tokens))
    ids: list[int] = []
    for piece in filter(None, re.split(f"({names})", text)):
        special = tokenizer.special_tokens.get(piece)
        ids += tokenizer.encode(piece) if special is None else [special]
    return tuple(ids)
