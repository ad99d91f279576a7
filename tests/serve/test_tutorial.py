"""docs/tutorials/serve.md works as it is written, on a demo that was trained for a few steps."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from phi4.cli.demo import MIDTRAIN, RECIPE
from tests.architecture.sizes import ROOT
from tests.support.waiting import LONG_SECONDS

PAGE = (ROOT / "docs/tutorials/serve.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
PORT = "8000"
SHORT = ("parallel.tensor=1", "parallel.sequence=false", "checkpoint.every=2")
DEMO = f"""
set -e
phi4 data demo --out runs/demo/data
phi4 train {RECIPE} run.steps=2 evaluation.every=0 parallel.pipeline=1 {" ".join(SHORT)}
phi4 train {MIDTRAIN} run.steps=2 evaluation.every=0 parallel.context=1 {" ".join(SHORT)}
"""
"""What `phi4 demo` leaves behind, as far as the page needs it."""


def blocks(language: str) -> list[str]:
    return [text for name, text in BLOCK.findall(PAGE) if name == language]


def script(port: int) -> str:
    """All that the page runs, in its order, with a line of its own before every block."""
    # A server that is left over would keep the output open.
    parts = ["set -euo pipefail", "trap 'kill $(jobs -p) 2>/dev/null || true' EXIT"]
    for number, (language, text) in enumerate(BLOCK.findall(PAGE)):
        if language == "python":
            text = f"python - <<'END'\n{text}END\n"
        if language in ("bash", "python"):
            parts.append(f"echo; echo '=== block {number}'\n{text}")
    return "\n".join(parts).replace(PORT, str(port))


def run(text: str, root: Path) -> str:
    """Output of a script and of all that it starts, which ends with it."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    started = subprocess.Popen(
        ["bash", "-c", text],
        cwd=root,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env=os.environ | {"PATH": path},
    )
    try:
        said, _ = started.communicate(timeout=LONG_SECONDS)
    finally:
        if started.poll() is None:
            os.killpg(started.pid, signal.SIGKILL)
    assert started.returncode == 0, said
    return said


def test_blocks_are_read() -> None:
    assert (len(blocks("bash")), len(blocks("python"))) == (7, 3)
    for text in blocks("python"):
        compile(text, "docs/tutorials/serve.md", "exec")
    # Each server that a block starts is ended by the same shell.
    servers = "".join(blocks("bash")).count("phi4 serve ")
    assert "".join(blocks("bash")).count("wait $server") == servers == 3


@pytest.mark.slow
def test_page_is_what_happens(tmp_path: Path) -> None:
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    run(DEMO, tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    said = run(script(port), tmp_path)
    outputs = re.split(r"^=== block \d+\n", said, flags=re.M)[1:]
    begun, whole, streamed, openai, chat_openai, _, ollama, _, followed, four = outputs
    # The block shows the last checkpoint of a demo that was trained to its end.
    [shown] = [text for text in blocks("text") if '"status"' in text]
    assert json.loads(shown)["weights"] == "step_0000020"
    [health] = re.findall(r'\{"status".*?\}', begun)
    assert json.loads(shown).keys() == json.loads(health).keys()
    answer = json.loads(whole)
    assert answer["usage"]["completion_tokens"] <= 40
    assert streamed.rstrip().endswith("data: [DONE]")
    assert all(text.strip() for text in (openai, chat_openai, ollama))
    assert '"weights":"step_0000020"' in followed and '"weights":"step_0000030"' in followed
    [again] = re.findall(r'\{"id".*\}\}', four)
    assert json.loads(again)["choices"] == answer["choices"]
