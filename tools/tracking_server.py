"""An MLflow server on this machine, and a proxy in front of it that takes its time."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

_START_SECONDS = 300.0
_HOP_HEADERS = {"connection", "transfer-encoding", "content-length", "content-encoding", "host"}


class TrackingServer:
    """`mlflow server` with a sqlite store in a directory, on loopback.

    Args:
        directory: exists; a second server in it continues with its store.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        with socket.create_server(("127.0.0.1", 0)) as free:
            self._port = free.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self._port}"
        self._process: subprocess.Popen | None = None

    def start(self) -> None:
        """Start it, and wait until it answers."""
        words = ("mlflow", "server", "--host", "127.0.0.1", "--port", str(self._port))
        store = f"sqlite:///{self._directory / 'mlflow.db'}"
        artifacts = str(self._directory / "artifacts")
        with (self._directory / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                [
                    *(sys.executable, "-m", *words, "--workers", "1"),
                    *("--backend-store-uri", store, "--artifacts-destination", artifacts),
                ],
                stdout=log,
                stderr=log,
                env={**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true"},
                start_new_session=True,
            )
        deadline = time.monotonic() + _START_SECONDS
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.kill()
                raise RuntimeError(f"mlflow server did not start; see {log.name}")
            time.sleep(0.2)

    def kill(self) -> None:
        """End it as a crash does."""
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.uri}/health", timeout=_START_SECONDS) as answer:
                return answer.status == 200
        except OSError:
            return False


@contextmanager
def tracking_server(directory: Path) -> Iterator[TrackingServer]:
    """A server for the time of the block."""
    directory.mkdir(parents=True, exist_ok=True)
    server = TrackingServer(directory)
    server.start()
    try:
        yield server
    finally:
        server.kill()


@contextmanager
def slow_proxy(uri: str, seconds: float) -> Iterator[str]:
    """The address of a proxy that delays every answer by some seconds."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _pass_on(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            headers = {k: v for k, v in self.headers.items() if k.lower() not in _HOP_HEADERS}
            request = urllib.request.Request(
                uri + self.path, data=body or None, headers=headers, method=self.command
            )
            try:
                with urllib.request.urlopen(request, timeout=_START_SECONDS) as answer:
                    status, found, text = answer.status, answer.headers, answer.read()
            except urllib.error.HTTPError as error:
                status, found, text = error.code, error.headers, error.read()
            time.sleep(seconds)
            # Who asked may be gone by now.
            with suppress(OSError):
                self.send_response(status)
                for key, value in found.items():
                    if key.lower() not in _HOP_HEADERS:
                        self.send_header(key, value)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

        do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _pass_on

        def log_message(self, *_: object) -> None:
            pass

    proxy = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    proxy.daemon_threads = True
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{proxy.server_address[1]}"
    finally:
        proxy.shutdown()
        proxy.server_close()
