"""`phi4 serve`: a model over HTTP, in any layout."""

import ipaddress
import os
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from phi4.cli.model_ranks import CheckpointPath
from phi4.cli.sampling_options import CacheTokens
from phi4.cli.serve_ranks import ServedRanks
from phi4.errors import ConfigError, PlatformError
from phi4.rundir.names import CHECKPOINTS_DIR

if TYPE_CHECKING:
    from phi4.convert.model_source import ModelSource

API_KEY_VARIABLE = "PHI4_API_KEY"
"""A key on a command line would be in the list of processes."""

_PACKAGES = ("fastapi", "uvicorn", "prometheus_client")

Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[SECTION.KEY=VALUE]...",
        help="Layout overrides, for example parallel.tensor=2; one process by default.",
        show_default=False,
    ),
]
Host = Annotated[
    str,
    typer.Option(
        metavar="ADDRESS",
        help="Address to listen on. 0.0.0.0 also accepts requests from other machines and "
        "needs an API key.",
    ),
]
Port = Annotated[
    int,
    typer.Option(min=0, max=65_535, help="Port; 0 chooses a free one, which the first line names."),
]
Name = Annotated[
    str | None,
    typer.Option(
        help="Model name for clients; by default the name of its directory.",
        show_default=False,
    ),
]
MaxRequests = Annotated[
    int,
    typer.Option(min=1, help="Maximum number of open requests; more are refused with status 429."),
]
DefaultMaxTokens = Annotated[
    int, typer.Option(min=1, help="Maximum number of new tokens of a request that sets none.")
]
BatchInvariant = Annotated[
    bool,
    typer.Option(
        "--batch-invariant",
        help="Compute in passes of fixed size: log-probabilities are bit-identical in any batch.",
    ),
]
DrainSeconds = Annotated[
    float, typer.Option(min=0.0, help="Time for open requests to finish after a request to stop.")
]
Follow = Annotated[
    bool,
    typer.Option(
        "--follow",
        help="Load the weights of every new checkpoint of the run; needs a run directory.",
    ),
]
NoKey = Annotated[
    bool, typer.Option("--no-key", help="Accept requests from other machines without an API key.")
]


def serve(
    checkpoint: CheckpointPath,
    overrides: Overrides = None,
    host: Host = "127.0.0.1",
    port: Port = 8000,
    name: Name = None,
    max_requests: MaxRequests = 1024,
    max_tokens: DefaultMaxTokens = 2048,
    follow: Follow = False,
    cache_tokens: CacheTokens = None,
    batch_invariant: BatchInvariant = False,
    drain_seconds: DrainSeconds = 20.0,
    no_key: NoKey = False,
) -> None:
    """Serve a model over HTTP: OpenAI's API under /v1, Ollama's under /api, a chat page at /.

    Once the server is ready, one line on stderr names the addresses; until then connections are
    refused. `GET /health` returns 200 while the server accepts requests and 503 while it shuts
    down.

    By default the server is reachable from this machine only (--host). Clients must send the API
    key of the environment variable PHI4_API_KEY as a bearer token. Without that variable no key is
    required, and --host must be a loopback address unless --no-key is given.

    With --follow the server loads every new checkpoint of a run: open requests finish with the old
    weights, and new ones wait until the new weights are loaded.

    Overrides set the layout, for example parallel.tensor=2 parallel.pipeline=2 for four processes.
    Answers do not depend on the layout.

    SIGTERM or Ctrl-C shuts the server down: new requests get 503, open ones have --drain-seconds to
    finish, and the exit code is 0. Only the process that you started, or rank 0, reacts to signals.
    A second signal, at least a second later, cuts open requests off.

    Exit codes: 0 shut down, 1 failed (with a traceback), 2 wrong input, 130 or 143 ended at once by
    a second signal, 137 a rank was killed (the last line names it).
    """
    _require_packages()
    api_key = _api_key(host, no_key)
    from phi4.convert.model_source import find_model
    from phi4.serve.server import ServerOptions

    source = find_model(checkpoint, overrides or [])
    source.tokenizer()
    served = ServedRanks(
        source=source,
        name=_name(source) if name is None else name,
        max_tokens=max_tokens,
        cache_tokens=cache_tokens,
        batch_invariant=batch_invariant,
        run_dir=_followed(source) if follow else None,
        options=ServerOptions(host, port, api_key, max_requests, drain_seconds),
        no_key=no_key,
    )
    if not served.name.strip():
        raise ConfigError(f"--name={name!r} is empty; clients ask for a model by its name")
    raise typer.Exit(served.run(overrides or []))


def _require_packages() -> None:
    """Refuse where the extra is not installed.

    Raises:
        PlatformError: names what is missing.
    """
    missing = [name for name in _PACKAGES if find_spec(name) is None]
    if missing:
        raise PlatformError(
            f"{', '.join(missing)} not installed; pip install 'phi4[serve]' (in a checkout: "
            "pip install -e '.[serve]')"
        )


def _api_key(host: str, no_key: bool) -> str | None:
    """The key of the environment.

    Raises:
        ConfigError: it is no key, or everybody on the network would be let in unasked.
    """
    key = os.environ.get(API_KEY_VARIABLE)
    if key is not None and not (key.isascii() and key.isprintable() and key.split() == [key]):
        raise ConfigError(
            f"{API_KEY_VARIABLE} is empty, or has spaces or other characters that no header may "
            "hold; give it printable ASCII without spaces, or unset it"
        )
    if no_key and key is not None:
        raise ConfigError(f"--no-key, and {API_KEY_VARIABLE} is set; unset it, or drop --no-key")
    if key is None and not no_key and not _is_loopback(host):
        raise ConfigError(
            f"--host={host} accepts requests of other machines, and {API_KEY_VARIABLE} is not set; "
            "set it, or pass --no-key to serve without a key"
        )
    return key


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _name(source: "ModelSource") -> str:
    """What the model is called by its directory."""
    run_dir = _run_dir(source)
    return source.path.resolve().name if run_dir is None else run_dir.name


def _run_dir(source: "ModelSource") -> Path | None:
    """The run directory that a checkpoint is in."""
    path = source.path.resolve()
    is_in_run = source.hugging_face is None and path.parent.name == CHECKPOINTS_DIR
    return path.parent.parent if is_in_run else None


def _followed(source: "ModelSource") -> Path:
    """The run to follow.

    Raises:
        ConfigError: the model is not in one.
    """
    run_dir = _run_dir(source)
    if run_dir is None:
        raise ConfigError(
            f"--follow waits for checkpoints of a run, and {source.path} is in none; give a run "
            "directory, or drop --follow"
        )
    return run_dir
