"""What clients of Ollama's API send: what of it is taken, what is ignored, and what is refused.

The decision: what this server cannot do is refused by name, so that no client believes in an option
that is not applied. Where Ollama has a default of its own, it is the default here, so that the same
program means the same against both.
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
        # How Ollama holds a model in memory.
        *("keep_alive", "num_batch", "num_gpu", "main_gpu", "num_thread", "num_keep", "numa"),
        *("low_vram", "f16_kv", "use_mmap", "use_mlock"),
        # Settings of penalties and of mirostat, which are refused themselves.
        *("repeat_last_n", "penalize_newline", "mirostat_tau", "mirostat_eta"),
        # How much /api/show tells.
        "verbose",
    )
)
"""Fields that no answer depends on here; any value of them is accepted."""

NEUTRAL = {"repeat_penalty": 1.0, "tfs_z": 1.0, "typical_p": 1.0}
"""Options that are not supported, and the values at which Ollama does not apply them either."""

MOST_TOP_LOGPROBS = 20
_MOST_STOP_STRINGS = 64
_FILLS_THE_CONTEXT = (-1, -2)
_RANDOM_SEED = -1
_ALL_TOKENS = -1

_Body = TypeVar("_Body", bound="OllamaFields")


class OllamaFields(BaseModel):
    """Fields of a body; null is as if the field were absent, and unknown ones are kept."""

    model_config = ConfigDict(extra="allow", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, sent: Any) -> Any:
        if not isinstance(sent, dict):
            return sent
        return {name: value for name, value in sent.items() if value is not None}

    def refuse_unsupported(self, where: str = "") -> None:
        """Refuse fields that are not ours, unless they ask for nothing.

        Args:
            where: what stands before their names in the error.

        Raises:
            ApiError: 400, with the name of the first one.
        """
        for name, value in (self.model_extra or {}).items():
            if value and name not in WITHOUT_EFFECT and value != NEUTRAL.get(name):
                field, shown = where + name, repr(value)[:100]
                raise bad_request(
                    f"{field}={shown} is not supported by this server; leave {field} out", field
                )


class OllamaOptions(OllamaFields):
    """The options of a draw, with the defaults of Ollama's Modelfile.

    `ignore_eos` and `stop_token_ids` are this server's own.
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
        """One stop string may come alone, and an empty one is none."""
        return ([sent] if sent else []) if isinstance(sent, str) else sent

    def max_tokens(self, model: ServedModel, num_prompt_tokens: int) -> int:
        """New tokens that are asked for.

        Raises:
            ApiError: 400 for a number that is none.
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
        """Refuse a context that the model does not have; a smaller one is part of what it has.

        Raises:
            ApiError: 400.
        """
        longest = model.limits.max_sequence_tokens
        if longest is not None and self.num_ctx > longest:
            raise bad_request(
                f"options.num_ctx={self.num_ctx}; this model's context has {longest} tokens; "
                "lower num_ctx or leave it out",
                "options.num_ctx",
            )


class AskedFields(OllamaFields):
    """What /api/generate and /api/chat have in common."""

    model: str
    stream: bool = True
    options: OllamaOptions = OllamaOptions()
    logprobs: bool = False
    top_logprobs: int = Field(default=0, ge=0, le=MOST_TOP_LOGPROBS)

    @property
    @abstractmethod
    def is_empty(self) -> bool:
        """Whether nothing is to be answered: Ollama loads the model then, and says so."""

    @abstractmethod
    def prompt_ids(self, tokenizer: Tokenizer) -> tuple[int, ...]:
        """Ids of the prompt.

        Raises:
            TokenizerError: it cannot be split into tokens.
        """

    def refuse_unsupported(self, where: str = "") -> None:
        """See `OllamaFields`; the options' fields are looked at, too."""
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
        """See `AskedFields`: the prompt is what a user says, unless it is raw."""
        if self.raw:
            return raw_ids(self.prompt, tokenizer)
        system = [Message(Role.SYSTEM, self.system)] if self.system else []
        return chat_prompt([*system, Message(Role.USER, self.prompt)], tokenizer)

    def refuse_unsupported(self, where: str = "") -> None:
        """See `AskedFields`; a raw prompt has no place for `system`."""
        super().refuse_unsupported(where)
        if self.raw and self.system:
            raise bad_request("system has no place in a raw prompt; leave out one of them", "raw")


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
        """See `AskedFields`: an answer that comes last is gone on with, as Ollama does."""
        turns = [Message(one.role, one.content) for one in self.messages]
        if turns[-1].role is Role.ASSISTANT:
            begun = tokenizer.encode(turns[-1].content)
            return (*chat_prompt(turns[:-1], tokenizer), *begun)
        return chat_prompt(turns, tokenizer)

    def refuse_unsupported(self, where: str = "") -> None:
        """See `AskedFields`; the messages' fields are looked at, too."""
        super().refuse_unsupported(where)
        for index, message in enumerate(self.messages):
            message.refuse_unsupported(f"messages.{index}.")


class ShowBody(OllamaFields):
    """The body of /api/show; clients of old call the model `name`."""

    model: str = ""
    name: str = ""


async def read_body(http: HttpRequest, form: type[_Body]) -> _Body:
    """The body in its form.

    The content type is not looked at: curl sends that of web forms, as in Ollama's own examples.

    Raises:
        RequestValidationError: it is not in this form.
        ApiError: see `OllamaFields.refuse_unsupported`.
    """
    try:
        body = form.model_validate_json(await http.body())
    except ValidationError as error:
        raise RequestValidationError(error.errors()) from None
    body.refuse_unsupported()
    return body


def request_of(body: AskedFields, model: ServedModel) -> Request:
    """What the model is asked.

    Args:
        body: that is not empty.
        model: that is asked.

    Raises:
        ApiError: 400, where the model cannot answer it.
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
    """Ids of a prompt that holds its template: names of special tokens in it are these tokens."""
    names = "|".join(map(re.escape, tokenizer.special_tokens))
    ids: list[int] = []
    for piece in filter(None, re.split(f"({names})", text)):
        special = tokenizer.special_tokens.get(piece)
        ids += tokenizer.encode(piece) if special is None else [special]
    return tuple(ids)
