"""A sampler over an OpenAI-compatible endpoint.

Features that the endpoint does not support are rejected by name before anything is sent, and stop
strings are searched here, so that a completion means the same as on our own engine. Sampling is the
server's: it repeats only as far as the server honours seeds.
"""

import queue
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from phi4.data.vocabulary.tokenizer import Tokenizer
from phi4.errors import ConfigError, DataError, SamplerError
from phi4.sampling.checks import check_request
from phi4.sampling.endpoint import Endpoint
from phi4.sampling.endpoint_reply import ReplyReader
from phi4.sampling.endpoint_request import lacks, path_and_body
from phi4.sampling.event_stream import EventStream, EventStreamError
from phi4.sampling.protocol import Event, ModelLimits, Request


class HttpSampler:
    """A `Sampler` over an endpoint, one connection per request.

    Args:
        endpoint: the endpoint.
        tokenizer: tokenizer of the ids.
        max_sequence_tokens: as in `ModelLimits`; exceeding the server's own limit is an error of
            the request.
    """

    def __init__(
        self, endpoint: Endpoint, tokenizer: Tokenizer, max_sequence_tokens: int | None = None
    ) -> None:
        if not endpoint.base_url.startswith(("http://", "https://")):
            raise ConfigError(
                f"endpoint {endpoint.base_url!r} is not an http:// or https:// address"
            )
        self.limits = ModelLimits(tokenizer.vocab_size, max_sequence_tokens)
        self._endpoint = endpoint
        self._tokenizer = tokenizer
        self._num_requests = 0
        self._streams: dict[int, EventStream] = {}
        # An id means that no more events of its request follow.
        self._happened: queue.SimpleQueue[list[Event] | SamplerError | int] = queue.SimpleQueue()
        self._workers = ThreadPoolExecutor(endpoint.max_connections)

    def submit(self, request: Request) -> int:
        """See `Sampler.submit`."""
        check_request(request, self.limits)
        endpoint = self._endpoint
        for lack in lacks(request, endpoint.form, self._tokenizer):
            raise ConfigError(f"an endpoint with form={endpoint.form} cannot {lack}")
        try:
            path, body = path_and_body(request, endpoint, self._tokenizer)
        except DataError as error:
            raise ConfigError(str(error)) from None
        url = endpoint.base_url.rstrip("/") + path
        request_id = self._num_requests
        self._num_requests += 1
        stream = EventStream(url, endpoint.api_key, endpoint.timeout_seconds)
        self._streams[request_id] = stream
        self._workers.submit(self._work, request_id, request, body, stream)
        return request_id

    def step(self) -> Sequence[Event]:
        """See `Sampler.step`; waits until a server sends something."""
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
        """See `Sampler.cancel`; closes the connection."""
        if request_id in self._streams:
            self._streams[request_id].abort()

    def close(self) -> None:
        """See `Sampler.close`."""
        for stream in self._streams.values():
            stream.abort()
        self._workers.shutdown(cancel_futures=True)
        self._streams.clear()

    def _work(
        self, request_id: int, request: Request, body: dict[str, object], stream: EventStream
    ) -> None:
        """Run one request in its own thread."""
        reader = ReplyReader(request_id, request, self._endpoint.form, self._tokenizer)
        try:
            for happened in _events(stream, body, reader):
                self._happened.put(happened)
        # Any error of parsing an answer: a thread that died would cause a hang.
        except Exception as error:
            if stream.is_aborted:
                self._happened.put(list(reader.cancelled()))
            else:
                said = str(error) if isinstance(error, EventStreamError) else f"sent {error!r}"
                message = f"{self._endpoint.base_url} {said}; check its log"
                self._happened.put(SamplerError(message, request_id))
        self._happened.put(request_id)


def _events(
    stream: EventStream, body: dict[str, object], reader: ReplyReader
) -> Iterator[list[Event]]:
    """Yield events until all samples have ended; without tokens to sample, nothing is sent."""
    if forced := reader.forced():
        yield forced
    if reader.has_ended:
        return
    for chunk in stream.post(body):
        if happened := reader.read(chunk):
            yield happened
        if reader.has_ended:
            return
    raise EventStreamError("closed the connection before the end of an answer")
