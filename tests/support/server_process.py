"""`phi4 serve` as a process of its own."""

import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.support.waiting import LONG_SECONDS, wait_until


@dataclass
class ServerProcess:
    """The process that a user starts; its ranks are its children."""

    process: subprocess.Popen
    stderr: Path

    @property
    def url(self) -> str:
        """Of its root, once it answers."""

        def answers() -> str:
            assert self.process.poll() is None, self.stderr.read_text()
            return address_in(self.stderr.read_text())

        return wait_until(answers, "the line that says where the server is")

    def rank(self, rank: int) -> psutil.Process:
        """The process of a rank."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        return next(one for one in children if one.environ().get("RANK") == str(rank))

    def ended(self) -> tuple[int, str]:
        """Its exit code, and what it said."""
        return self.process.wait(LONG_SECONDS), self.stderr.read_text()


@contextmanager
def server_process(model: Path, *words: str) -> Iterator[ServerProcess]:
    """Serve a model on a free port while the block runs."""
    stderr = model.parent / "stderr"
    argv = [sys.executable, "-m", "phi4", "serve", str(model), "--port=0", *words]
    with stderr.open("w") as err:
        process = subprocess.Popen(argv, stderr=err)
    try:
        yield ServerProcess(process, stderr)
    finally:
        process.kill()
        process.wait()


def address_in(err: str) -> str:
    """The address in the line that a server prints when it answers; empty before."""
    found = re.search(r"^serving .*OpenAI's API (\S+)/v1,", err, re.MULTILINE)
    return found[1] if found else ""
