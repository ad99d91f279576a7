"""docs/tutorials/serve.md works as it is written, on a demo that was trained for a few steps."""

import json
import re
from pathlib import Path

import pytest

from phi4.cli.demo import MIDTRAIN
from tests.support.pages import ROOT, SHORT, SHORT_DEMO, Block, free_port, run, script
from tests.support.pages import blocks as blocks_of

PAGE = blocks_of(ROOT / "docs/tutorials/serve.md")
PORT = "8000"
DEMO = f"""{SHORT_DEMO}
phi4 train {MIDTRAIN} run.steps=2 evaluation.every=0 parallel.context=1 {" ".join(SHORT)}
"""
"""What `phi4 demo` leaves behind, as far as the page needs it."""


def blocks(language: str) -> list[str]:
    return [block.text for block in PAGE if block.language == language]


def in_bash(block: Block) -> str:
    return block.text if block.language == "bash" else f"python - <<'END'\n{block.text}END\n"


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
    parts = [in_bash(block) for block in PAGE if block.language in ("bash", "python")]
    outputs = run(script(parts).replace(PORT, str(free_port())), tmp_path)
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
