"""SFT and DPO beside trl's trainers: the same weights and data, step by step.

trl computes padded, one sequence a row; phi4 packed, with pairs spread unevenly over micro-batches
and rows, and with references that the engine computed. trl averages per micro-batch, so it gets one
micro-batch per step.
"""

import json
import os
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import Phi3ForCausalLM

from phi4.config import DpoConfig, ModelConfig, Recipe
from phi4.convert.hf import read_hf
from phi4.data.stream.batch import Batch
from phi4.engine.engine import Engine
from phi4.engine.objective import Objective
from phi4.stages.dpo import PreferenceLoss
from phi4.stages.pretrain import NextToken
from tests.support.engines import engine_on, tiny_recipe
from tests.support.hugging_face import phi3_config
from tests.support.pair_rows import Conversation, Pair, Row, mean_chosen_tokens, pair_batch
from tests.support.ranks import pool_fixture
from tests.support.waiting import LONG_SECONDS

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".venv-trl/bin/python"
MODEL = ModelConfig(
    num_layers=2,
    hidden_size=64,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=224,
    vocab_size=256,
    max_position_embeddings=256,
    rope_theta=250_000.0,
)
NUM_WORDS, NUM_ITEMS, EPOCHS, BATCH = 200, 16, 3, 4
NUM_STEPS = EPOCHS * NUM_ITEMS // BATCH
LEARNING_RATE = 1e-3
PAD, UNKNOWN, IM_START, IM_SEP, IM_END, USER, ASSISTANT = range(NUM_WORDS, NUM_WORDS + 7)
WORDS = {f"t{i}": i for i in range(NUM_WORDS)} | {
    "<pad>": PAD,
    "<unk>": UNKNOWN,
    "<im_start>": IM_START,
    "<im_sep>": IM_SEP,
    "<im_end>": IM_END,
    "user": USER,
    "assistant": ASSISTANT,
}
LOSS_ERROR, GRAD_NORM_ERROR = 1e-5, 1e-5
SFT_GRAD_NORM_ERROR = 2e-4
"""After 11 steps trl is 6e-5 from a loop in fp64, phi4 2e-5."""
LOG_PROB_ERROR = {"rel": 1e-6, "abs": 5e-5}
LOSSES = {
    "sigmoid": (DpoConfig(), {"loss_type": ["sigmoid"]}),
    "ipo": (DpoConfig(loss="ipo"), {"loss_type": ["ipo"]}),
    "hinge": (DpoConfig(loss="hinge"), {"loss_type": ["hinge"]}),
    "sigmoid_norm": (DpoConfig(loss="sigmoid_norm"), {"loss_type": ["sigmoid_norm"]}),
    "sigmoid and sft": (
        DpoConfig(sft_weight=0.3),
        {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.3]},
    ),
}


@dataclass
class Found:
    """Of the steps of a training; log-probabilities of each pair's answers before it."""

    losses: list[float]
    grad_norms: list[float]
    metrics: list[dict[str, float]]
    references: np.ndarray | None = None


Turns = list[tuple[int, np.ndarray]]
"""Role and words of each."""


def draw(random: np.random.Generator, low: int, high: int) -> np.ndarray:
    return random.integers(1, NUM_WORDS, random.integers(low, high))


def drawn_pairs() -> list[Pair]:
    """Uneven ones, without an end."""
    random = np.random.default_rng(0)
    lengths = ((3, 30), (1, 25), (1, 25))
    return [Pair(*(draw(random, *length) for length in lengths)) for _ in range(NUM_ITEMS)]


def drawn_turns() -> list[Turns]:
    random = np.random.default_rng(1)
    turns = ((USER, 2, 12), (ASSISTANT, 1, 20), (USER, 2, 6), (ASSISTANT, 1, 20))
    return [[(role, draw(random, *span)) for role, *span in turns] for _ in range(NUM_ITEMS)]


def text(ids: np.ndarray) -> str:
    return " ".join(f"t{i}" for i in ids)


def as_trl_pair(pair: Pair) -> dict[str, str]:
    answers = {"chosen": f" {text(pair.chosen)} ", "rejected": f" {text(pair.rejected)} "}
    return {"prompt": text(pair.prompt), **answers}


def as_trl_conversation(turns: Turns) -> dict[str, list[dict[str, str]]]:
    names = {USER: "user", ASSISTANT: "assistant"}
    return {"messages": [{"role": names[role], "content": text(ids)} for role, ids in turns]}


def ended(pair: Pair) -> Pair:
    return replace(
        pair, chosen=np.append(pair.chosen, IM_END), rejected=np.append(pair.rejected, IM_END)
    )


def conversation(turns: Turns) -> Conversation:
    """Loss on the assistant's words and the end of its turns."""
    ids, weights = [], []
    for role, words in turns:
        ids += [IM_START, role, IM_SEP, *words, IM_END]
        weights += [False] * 3 + [role == ASSISTANT] * (len(words) + 1)
    return Conversation(np.array(ids), np.array(weights))


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the initial weights, as transformers writes them."""
    path = tmp_path_factory.mktemp("trl") / "model"
    torch.manual_seed(0)
    ids = {"bos_token_id": IM_START, "eos_token_id": IM_END, "pad_token_id": PAD}
    Phi3ForCausalLM(phi3_config(MODEL, **ids)).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def theirs(directory: Path) -> dict[str, Found]:
    """What trl finds, by case."""
    if not PYTHON.exists():
        pytest.skip(".venv-trl is missing: run tools/setup_trl.sh")
    pairs = [as_trl_pair(pair) for pair in drawn_pairs()]
    cases = {
        name: {"pairs": pairs, "beta": 0.1, **options} for name, (_, options) in LOSSES.items()
    }
    cases["sft"] = {"conversations": [as_trl_conversation(turns) for turns in drawn_turns()]}
    settings = {
        "per_device_train_batch_size": BATCH,
        "num_train_epochs": EPOCHS,
        "learning_rate": LEARNING_RATE,
    }
    job = {"model": str(directory), "words": WORDS, "settings": settings, "cases": cases}
    job_path, result_path = (directory.parent / name for name in ("job.json", "result.json"))
    job_path.write_text(json.dumps(job))
    command = [PYTHON, ROOT / "tests/support/trl_runs.py", job_path, result_path]
    environment = os.environ | {"HF_HOME": str(directory.parent / "cache"), "PYTHONPATH": ""}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=LONG_SECONDS, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return {name: found_of(case) for name, case in json.loads(result_path.read_text()).items()}


def found_of(case: dict[str, list]) -> Found:
    losses, grad_norms = case.pop("loss"), case.pop("grad_norm")
    references = np.array(case.pop("reference")) if "reference" in case else None
    metrics = [{name: values[step] for name, values in case.items()} for step in range(NUM_STEPS)]
    return Found(losses, grad_norms, metrics, references)


pool = pool_fixture(1)


def check(found: Found, exact: Found, grad_norm_error: float = GRAD_NORM_ERROR) -> None:
    assert len(found.losses) == len(exact.losses) == NUM_STEPS
    assert found.losses == pytest.approx(exact.losses, rel=0, abs=LOSS_ERROR)
    assert found.grad_norms == pytest.approx(exact.grad_norms, rel=grad_norm_error)
    for ours, trls in zip(found.metrics, exact.metrics, strict=True):
        assert {name: ours[name] for name in trls} == pytest.approx(trls, **LOG_PROB_ERROR)
    if exact.references is not None:
        np.testing.assert_allclose(found.references, exact.references, rtol=1e-6, atol=5e-5)


@pytest.mark.parametrize("name", LOSSES)
def test_dpo_trains_as_trl_does(name: str, directory, theirs, pool) -> None:
    pairs = [ended(pair) for pair in drawn_pairs()]
    check(pool.run(train_dpo, directory, pairs, LOSSES[name][0])[0], theirs[name])


def test_sft_trains_as_trl_does(directory, theirs, pool) -> None:
    conversations = [conversation(turns) for turns in drawn_turns()]
    found = pool.run(train_sft, directory, conversations)[0]
    check(found, theirs["sft"], SFT_GRAD_NORM_ERROR)


@pytest.mark.parametrize(
    ("end", "sign"), [(lambda pair: pair, 1), (ended, -1)], ids=["no end", "reference added"]
)
def test_a_mutant_is_found(end: Callable[[Pair], Pair], sign: int, directory, theirs, pool) -> None:
    pairs = [end(pair) for pair in drawn_pairs()]
    found = pool.run(train_dpo, directory, pairs, DpoConfig(), sign)[0]
    with pytest.raises(AssertionError):
        check(replace(found, references=theirs["sigmoid"].references), theirs["sigmoid"])


# What follows runs in the rank.


def recipe() -> Recipe:
    model = (f"model.{name}={value}" for name, value in MODEL.model_dump().items())
    optimizer = ("beta2=0.999", "eps=1e-8", "weight_decay=0.0", "clip_grad=1.0")
    length = ("data.sequence_length=256", "data.unit_tokens=256")
    return tiny_recipe(*model, *(f"optim.{setting}" for setting in optimizer), *length)


def steps_of(items: Sequence[Pair | Conversation]) -> Iterator[list[Row]]:
    """Rows of each step, two micro-batches of two rows: three items, then one and a dummy row."""
    for _ in range(EPOCHS):
        for first in range(0, NUM_ITEMS, BATCH):
            a, b, c, d = items[first : first + BATCH]
            yield [[a, b], [c], [d], []]


def halves(rows: list[Row], tokens_per_pair: float) -> list[Batch]:
    return [pair_batch(half, 256, tokens_per_pair) for half in (rows[:2], rows[2:])]


def train(engine: Engine, steps: Sequence[list[Batch]], objective: Objective) -> Found:
    results = [engine.train_step(s, objective, learning_rate=LEARNING_RATE) for s in steps]
    losses, norms = [r.loss for r in results], [r.grad_norm for r in results]
    return Found(losses, norms, [r.metrics for r in results])


def train_dpo(
    rank: int,
    world_size: int,
    directory: Path,
    pairs: list[Pair],
    settings: DpoConfig,
    sign: int = 1,
) -> Found:
    """With references that the engine computes first, times a sign."""
    with engine_on(rank, recipe()) as engine:
        engine.load_whole_parameters(dict(read_hf(directory)[1]()))
        references = np.array([log_probs_of(engine, pair) for pair in pairs])
        referred = [
            replace(pair, reference=tuple(sign * both))
            for pair, both in zip(pairs, references, strict=True)
        ]
        steps = [halves(rows, mean_chosen_tokens(rows)) for rows in steps_of(referred)]
        return replace(train(engine, steps, PreferenceLoss(settings)), references=references)


def log_probs_of(engine: Engine, pair: Pair) -> list[float]:
    """Of both answers, summed in fp64."""
    batch = pair_batch([[pair]], 256)
    [found] = engine.log_probs([batch])
    log_probs = found.labels.astype(np.float64)
    return [log_probs[batch.segment_ids == side].sum() for side in (0, 1)]


def train_sft(
    rank: int, world_size: int, directory: Path, conversations: list[Conversation]
) -> Found:
    with engine_on(rank, recipe()) as engine:
        engine.load_whole_parameters(dict(read_hf(directory)[1]()))
        steps = [halves(rows, 1.0) for rows in steps_of(conversations)]
        return train(engine, steps, NextToken())
