"""A server's lifetime: it listens, answers requests, drains and ends."""

import socket
import sys
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass

from phi4.sampling.protocol import Sampler
from phi4.serve.app import make_app
from phi4.serve.served_model import ServedModel
from phi4.serve.traffic import Traffic
from phi4.serve.web_pages import hosts_of
from phi4.serve.web_server import listen, serving


@dataclass(frozen=True)
class ServerOptions:
    """Address and capacity of a server.

    Attributes:
        host: address or name of this machine.
        port: 0 takes a free one.
        api_key: key required of clients; None requires none.
        max_requests: maximum number of open requests.
        drain_seconds: time for open requests to finish once the server is told to end.
    """

    host: str
    port: int
    api_key: str | None
    max_requests: int
    drain_seconds: float


def answer_until(
    told: threading.Event,
    sampler: Sampler,
    model: ServedModel,
    weights: str,
    options: ServerOptions,
    beside: Callable[[Traffic], AbstractContextManager[None]] = lambda _: nullcontext(),
) -> None:
    """Answer requests, on the model's thread, until the server is told to end and has drained.

    Prints one line with the address on stderr once it is ready.

    Args:
        told: set to end the server; may be set before it is ready.
        sampler: used exclusively meanwhile.
        model: metadata for clients.
        weights: name of its weights.
        options: options of the server.
        beside: context entered while requests are answered, such as `phi4.serve.follow.follow`.

    Raises:
        PlatformError: the port is taken, or the address is not this machine's.
    """
    traffic = Traffic(weights, options.max_requests, options.drain_seconds)
    listener = listen(options.host, options.port)
    url = base_url(options.host, listener.getsockname()[1])

    def drain() -> None:
        told.wait()
        traffic.drain()
        say(
            f"no more requests are accepted; the {traffic.num_open} open ones have "
            f"{options.drain_seconds:g} s to end"
        )

    app = make_app(traffic, model, options.api_key, hosts_of(options.host))
    with serving(app, listener):
        threading.Thread(target=drain, name="drain", daemon=True).start()
        key = "no key" if options.api_key is None else "the key is PHI4_API_KEY"
        say(
            f"serving {model.name} ({weights}): chat page {url}/, OpenAI's API {url}/v1, "
            f"Ollama's API {url} ({key})"
        )
        with beside(traffic):
            traffic.run(sampler)
    counts = traffic.counts
    say(f"ended: {counts.completed} requests answered, {counts.cancelled} cancelled")


def base_url(host: str, port: int) -> str:
    """Return the address for clients."""
    if host in ("0.0.0.0", "::"):
        host = socket.gethostname()
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def say(line: str) -> None:
    """Print a line for the operator."""
    # A server outlives the terminal or the pipe that it was started in.
    with suppress(OSError):
        print(line, file=sys.stderr, flush=True)
