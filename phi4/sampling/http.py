"""A sampler over an OpenAI-compatible endpoint.

The decision: what the endpoint cannot do is refused by name before anything is sent, and stops are
searched here, so that a completion means the same as on our own engine. The draws are the server's:
they repeat only as far as it keeps its own word on seeds.
"""

import queue
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from enum import StrEnum

from phi4.data.vocabulary.tokenizer import Tokenizer
from phi4.errors import ConfigError, DataError, SamplerError
from phi4.sampling.chat import plain_text, read_chat_prompt
from phi4.sampling.checks import check_request
from phi4.sampling.event_stream import EventStream, EventStreamError
from phi4.sampling.protocol import (
    Alternative,
    Event,
    FinishReason,
    ModelLimits,
    Request,
    Token,
)
from phi4.sampling.samples import OpenSample
from phi4.sampling.text import end_ids

_MAX_BIAS = 100
_ID_PREFIX = "token_id:"


class PromptForm(StrEnum):
    """How prompt and answer travel.

    `ids` needs vLLM's extensions `return_token_ids` and `return_tokens_as_token_ids`. The other
    two work everywhere; the ids of their completions are an encoding of the server's text, piece
    by piece, and max_tokens counts those.
    """

    IDS = "ids"
    TEXT = "text"
    CHAT = "chat"


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


class HttpSampler:
    """A `Sampler` over an endpoint, one connection per request.

    Args:
        endpoint: where to ask.
        tokenizer: of the ids.
        max_sequence_tokens: as in `ModelLimits`; the server's own limit is an error of the request.
    """

    def __init__(
        self, endpoint: Endpoint, tokenizer: Tokenizer, max_sequence_tokens: int | None = None
    ) -> None:
        if not endpoint.base_url.startswith(("http://", "https://")):
            raise ConfigError(f"endpoint {endpoint.base_url!r} is no http:// or https:// address")
        self.limits = ModelLimits(tokenizer.vocab_size, max_sequence_tokens)
        self._endpoint = endpoint
        self._tokenizer = tokenizer
        self._num_requests = 0
        self._streams: dict[int, EventStream] = {}
        # An id says that nothing more comes of its request.
        self._happened: queue.SimpleQueue[list[Event] | SamplerError | int] = queue.SimpleQueue()
        self._workers = ThreadPoolExecutor(endpoint.max_connections)

    def submit(self, request: Request) -> int:
        """See `Sampler.submit`."""
        check_request(request, self.limits)
        for lack in _lacks(request, self._endpoint.form, self._tokenizer):
            raise ConfigError(f"an endpoint with form={self._endpoint.form} cannot {lack}")
        path, prompt = self._prompt(request)
        body = prompt | _body(request, self._endpoint)
        url, key = self._endpoint.base_url.rstrip("/") + path, self._endpoint.api_key
        request_id = self._num_requests
        self._num_requests += 1
        stream = EventStream(url, key, self._endpoint.timeout_seconds)
        self._streams[request_id] = stream
        self._workers.submit(self._work, request_id, request, body, stream)
        return request_id

    def step(self) -> Sequence[Event]:
        """See `Sampler.step`; waits until a server says something."""
        while self._streams:
            item = self._happened.get()
            if isinstance(item, int):
                del self._streams[item]
            elif isinstance(item, SamplerError):
                raise item
            else:
                return item
        return []

    def cancel(self, request_id: int) -> None:
        """See `Sampler.cancel`: closes the connection."""
        if request_id in self._streams:
            self._streams[request_id].abort()

    def close(self) -> None:
        """See `Sampler.close`."""
        for stream in self._streams.values():
            stream.abort()
        self._workers.shutdown(cancel_futures=True)
        self._streams.clear()

    def _prompt(self, request: Request) -> tuple[str, dict[str, object]]:
        """The path, and the prompt in the endpoint's form."""
        try:
            match self._endpoint.form:
                case PromptForm.IDS:
                    return "/completions", {"prompt": [*request.prompt, *request.forced]}
                case PromptForm.TEXT:
                    text = plain_text(request.prompt, self._tokenizer)
                    return "/completions", {"prompt": text}
                case PromptForm.CHAT:
                    turns = read_chat_prompt(request.prompt, self._tokenizer)
                    said = [{"role": turn.role.value, "content": turn.content} for turn in turns]
                    return "/chat/completions", {"messages": said}
        except DataError as error:
            raise ConfigError(str(error)) from None

    def _work(
        self, request_id: int, request: Request, body: dict[str, object], stream: EventStream
    ) -> None:
        """Run one request; in a thread of its own."""
        samples = [
            OpenSample(request_id, index, request, self._tokenizer) for index in range(request.n)
        ]
        try:
            for happened in self._events(stream, request, samples, body):
                self._happened.put(happened)
        # Whatever it is that cannot be read in an answer: a thread that died would be a hang.
        except Exception as error:
            if stream.is_aborted:
                left = [sample for sample in samples if not sample.has_ended]
                self._happened.put([sample.end(FinishReason.CANCELLED) for sample in left])
            else:
                said = str(error) if isinstance(error, EventStreamError) else f"sent {error!r}"
                message = f"{self._endpoint.base_url} {said}; look at its log"
                self._happened.put(SamplerError(message, request_id))
        self._happened.put(request_id)

    def _events(
        self,
        stream: EventStream,
        request: Request,
        samples: Sequence[OpenSample],
        body: dict[str, object],
    ) -> Iterator[list[Event]]:
        for sample in samples:
            for token_id in request.forced:
                yield sample.add(Token(token_id))
        if all(sample.has_ended for sample in samples):
            return
        for chunk in stream.post(body):
            if "error" in chunk:
                raise EventStreamError(f"failed in the middle: {chunk['error']}")
            for choice in chunk.get("choices") or ():
                happened = self._read(choice, samples[choice["index"]])
                if happened:
                    yield happened
            if all(sample.has_ended for sample in samples):
                return
        raise EventStreamError("broke off before the end of an answer")

    def _read(self, choice: dict, sample: OpenSample) -> list[Event]:
        """What a piece of one sample makes happen; what the server sends after its end is left."""
        happened: list[Event] = []
        if sample.has_ended:
            return happened
        for token in self._tokens(choice, sample.request):
            happened += sample.add(token)
            if sample.has_ended:
                return happened
        reason = choice.get("finish_reason")
        if reason is not None:
            happened.append(sample.end(FinishReason(reason)))
        return happened

    def _tokens(self, choice: dict, request: Request) -> list[Token]:
        text = choice.get("text") or (choice.get("delta") or {}).get("content") or ""
        if self._endpoint.form is not PromptForm.IDS:
            return list(map(Token, self._tokenizer.encode(text)))
        ids = choice.get("token_ids")
        if ids is None and text:
            raise EventStreamError(
                "sends no token ids, for it lacks return_token_ids; set form to text or chat"
            )
        foreign = [i for i in ids or () if not 0 <= i < self.limits.vocab_size]
        if foreign:
            raise EventStreamError(f"sent token id {foreign[0]}, which the tokenizer lacks")
        if not ids or not request.log_probs:
            return list(map(Token, ids or ()))
        scored, num_top = choice["logprobs"], request.num_top_log_probs
        tops = scored["top_logprobs"] if num_top else [{}] * len(ids)
        return [
            Token(token_id, log_prob, log_prob, _alternatives(top, num_top))
            for token_id, log_prob, top in zip(ids, scored["token_logprobs"], tops, strict=True)
        ]


def _lacks(request: Request, form: PromptForm, tokenizer: Tokenizer) -> Iterator[str]:
    """What a request asks for and an endpoint cannot do."""
    raw_is_sampled = (request.temperature, request.top_p, request.top_k) == (1, 1, 0)
    if request.prompt_log_probs:
        yield "score prompts (prompt_log_probs); use a local model"
    if form is PromptForm.IDS:
        if request.log_probs and request.forced:
            yield "give the log-probs of forced tokens; leave log_probs or forced out"
        if request.log_probs and not (
            raw_is_sampled
            and not request.min_p
            and not request.logit_bias
            and not request.forbidden_first
        ):
            yield (
                "give both log-probs where the sampler differs from the raw model; draw at "
                "temperature 1 without truncation and bias"
            )
        if request.forbidden_first and request.max_tokens > 1 and not request.forced:
            yield "forbid the first token only (forbidden_first); ask for max_tokens=1 and go on"
        if any(abs(bias) > _MAX_BIAS for bias in request.logit_bias.values()):
            yield f"take a logit_bias beyond {_MAX_BIAS}; lower it"
        return
    for name in ("forced", "forbidden_first", "logit_bias", "log_probs", "top_k", "min_p"):
        if getattr(request, name):
            yield f"do {name}; use form=ids, or a local model"
    if request.stop_ids - end_ids(tokenizer):
        yield "stop at ids that are no ends of a text (stop_ids); use form=ids"


def _body(request: Request, endpoint: Endpoint) -> dict[str, object]:
    """The fields beside the prompt."""
    body: dict[str, object] = {
        "model": endpoint.model,
        "max_tokens": request.max_tokens - len(request.forced),
        "n": request.n,
        "temperature": request.temperature,
        "top_p": request.top_p,
        "seed": request.seed,
        "stream": True,
    }
    if endpoint.form is not PromptForm.IDS:
        return body
    bias = dict(request.logit_bias)
    if not request.forced:
        bias |= dict.fromkeys(request.forbidden_first, -_MAX_BIAS)
    extensions = {
        "return_token_ids": True,
        "stop_token_ids": sorted(request.stop_ids) or None,
        "top_k": request.top_k or None,
        "min_p": request.min_p or None,
        "logit_bias": {str(token_id): value for token_id, value in bias.items()} or None,
    }
    if request.log_probs:
        extensions |= {"logprobs": request.num_top_log_probs, "return_tokens_as_token_ids": True}
    return body | {name: value for name, value in extensions.items() if value is not None}


def _alternatives(top: dict[str, float], num: int) -> tuple[Alternative, ...]:
    if not all(name.startswith(_ID_PREFIX) for name in top):
        raise EventStreamError("names tokens by text, for it lacks return_tokens_as_token_ids")
    found = [Alternative(int(name.removeprefix(_ID_PREFIX)), value) for name, value in top.items()]
    # Servers add the drawn token where it is not among the likeliest.
    return tuple(sorted(found, key=lambda top: (-top.log_prob, top.id))[:num])
