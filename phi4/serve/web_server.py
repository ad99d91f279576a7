"""Run the web server in its own thread, next to the model's."""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import uvicorn
from fastapi import FastAPI

from phi4.errors import PlatformError
from phi4.serve.connections import ConnectionLimits, LimitedConnection

_MARGIN_SECONDS = 1
"""Time from the end of the last connection to the end of its handler."""


def listen(host: str, port: int) -> socket.socket:
    """Return a listening socket of an address or a name.

    Args:
        host: address or name of this machine.
        port: 0 takes a free one.

    Raises:
        PlatformError: the port is taken, or the address is not this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise PlatformError(
            f"cannot listen on {host}:{port}: {error.strerror}; use another --port or --host"
        ) from None


@contextmanager
def serving(
    app: FastAPI, listener: socket.socket, limits: ConnectionLimits | None = None
) -> Iterator[None]:
    """Answer HTTP during the block, which keeps the caller's thread.

    Args:
        app: the application.
        listener: see `listen`; closed at the end.
        limits: timeouts of inactive clients.
    """
    limits = limits or ConnectionLimits()
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        lifespan="off",
        # uvicorn calls it as it would call the class.
        http=partial(LimitedConnection, limits),  # type: ignore[arg-type]
        timeout_graceful_shutdown=limits.closing_seconds + _MARGIN_SECONDS,
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, args=([listener],), name="http", daemon=True)
    thread.start()
    try:
        yield
    finally:
        server.should_exit = True
        thread.join()
        listener.close()
