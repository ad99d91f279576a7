"""lm-eval's `local-completions` on `phi4 serve` in several processes, beside its own `hf`.

What differs is left out. A text beyond the model's longest sequence: lm-eval cuts it from the left,
one token apart in the two. A prompt sent as text (`tokenized_requests=False`) where it would hold a
special token, as an empty context and rolling windows do: the server reads text as text. A special
token in a new text: `hf` leaves it out, the server shows it; the model here draws none.
"""

import json
import math
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from phi4.convert.checkpoint import export_checkpoint
from phi4.data.vocabulary.tokenizer import Tokenizer
from phi4.engine.platform import connect, disconnect
from tests.support.commands import command, write_model
from tests.support.ranks import pool_fixture
from tests.support.server_process import server_process
from tests.support.waiting import LONG_SECONDS

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".venv-lm-eval/bin/python"
LAYOUT = ("parallel.tensor=2", "parallel.pipeline=2")
MODEL = ("model.max_position_embeddings=256", "model.init_std=0.4")
WORDS = ("Answer", "Question", "process", "words", "has", "every", "def", "naïve", "Straße", "你好")
LOG_PROB_ERROR = 1e-4
SERVERS = {
    "ids": {"batch_size": 8},
    "texts": {"tokenized_requests": False, "num_concurrent": 4},
}
"""Prompts as lists of ids in one request, and as texts in several at once."""

PAIRS = [
    *((" ".join(WORDS[: i % 7 + 1]), f" {WORDS[-i % 10]} {WORDS[i % 9]}") for i in range(60)),
    *((f"Question: {word}? ", word) for word in WORDS),
    ("Answer " * 60, "Answer"),
]
ALONE = [("", word) for word in WORDS]
ROLLING = [" ".join(WORDS), "Answer\n" * 30, "def f(x): return x ** 2"]
GENERATED = [
    ["Every process", {"until": ["\n\n"], "max_gen_toks": 24}],
    ["Question: naïve", {"until": ["e", "\n"], "max_gen_toks": 24}],
    ["def", {"until": ["Answer"], "max_gen_toks": 32, "temperature": 0.0}],
]


pool = pool_fixture(1)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("run")


@pytest.fixture(scope="module")
def tokenizer(pool, run) -> Tokenizer:
    return write_model(pool, run, *MODEL, text="Answer\nQuestion\n" * 40)


@pytest.fixture(scope="module")
def found(pool, run, tokenizer) -> dict[str, dict[str, Any]]:
    """What every back-end says of the same texts."""
    if not PYTHON.exists():
        pytest.skip(".venv-lm-eval is missing: run tools/setup_lm_eval.sh")
    model = run / "hf"
    pool.run(export, run / "checkpoints" / "step_0000000", model)
    draw_no_special_tokens(model, len(tokenizer.mergeable_ranks))
    greedy = json.loads(command(pool, "generate", model, "def", "--max-tokens=3", "--json").out)
    with server_process(model, *LAYOUT, "--name=tiny") as server:
        job = {
            "model": str(model),
            "name": "tiny",
            "url": f"{server.url}/v1/completions",
            "servers": SERVERS,
            "pairs": PAIRS,
            "alone": ALONE,
            "encoded": [
                [tokenizer.encode("Ans"), tokenizer.encode("wer")],
                [tokenizer.encode("def"), greedy["tokens"]],
            ],
            "rolling": ROLLING,
            "generated": GENERATED,
        }
        (run / "job.json").write_text(json.dumps(job))
        ran = subprocess.run(
            [PYTHON, ROOT / "tests/support/lm_eval_runs.py", run / "job.json", run / "found.json"],
            capture_output=True,
            text=True,
            timeout=LONG_SECONDS,
            # PYTHONPATH would put packages of the tests before those of the environment.
            env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        )
        assert ran.returncode == 0, ran.stderr
        server.process.terminate()
        code, err = server.ended()
        assert code == 0, err
    return json.loads((run / "found.json").read_text())


@pytest.mark.parametrize("server", SERVERS)
def test_log_likelihoods_are_those_of_the_model_itself(found, server) -> None:
    check_equal(found[server]["pairs"], found["hf"]["pairs"])
    # Not all the same, as a server without echo makes them.
    assert len({round(one, 3) for one, _ in found["hf"]["pairs"]}) > 50


@pytest.mark.parametrize("server", SERVERS)
def test_texts_that_go_on_are_too(found, server) -> None:
    assert found[server]["generated"] == found["hf"]["generated"]
    assert all(text for text in found["hf"]["generated"])


def test_texts_as_a_whole_are_too(found) -> None:
    check_equal(found["ids"]["alone"], found["hf"]["alone"])
    assert found["ids"]["rolling"] == pytest.approx(found["hf"]["rolling"], rel=1e-6)


def test_continuation_that_merges_into_its_context_can_be_scored(found, tokenizer) -> None:
    """By ids: of the two texts lm-eval itself makes an empty continuation."""
    assert len(tokenizer.encode("Answer")) == 1
    check_equal(found["ids"]["encoded"], found["hf"]["encoded"])
    [merged, _], [_, is_greedy] = found["ids"]["encoded"]
    assert math.isfinite(merged) and merged < 0 and is_greedy


def check_equal(found: list[list], expected: list[list]) -> None:
    """Log-likelihoods within the error, and whether they are the likeliest."""
    assert [one for one, _ in found] == pytest.approx(
        [one for one, _ in expected], abs=LOG_PROB_ERROR, rel=0
    )
    assert [is_greedy for _, is_greedy in found] == [is_greedy for _, is_greedy in expected]


def draw_no_special_tokens(model: Path, num_ordinary: int) -> None:
    """Give the special tokens a logit of 0, which is never the highest of hundreds."""
    [file] = model.glob("*.safetensors")
    weights = load_file(file)
    weights["lm_head.weight"][num_ordinary:] = 0.0
    save_file(weights, file, {"format": "pt"})


# What follows runs in the ranks.


def export(rank: int, world_size: int, checkpoint: Path, out: Path) -> None:
    export_checkpoint(checkpoint, out, connect("cpu"))
    disconnect()
