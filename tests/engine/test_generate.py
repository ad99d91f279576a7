"""Generation: the same tokens in every layout, and text that arrives whole."""

import contextlib
import io
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from phi4.cli import main
from phi4.config import dump_toml
from phi4.data.stream.batch import build_batch
from phi4.data.vocabulary.bpe import train_bpe
from phi4.data.vocabulary.tokenizer import Tokenizer, rank_file_bytes
from phi4.engine.checkpoint import save_checkpoint
from phi4.engine.generate import generate
from phi4.engine.layout import destroy_layout
from phi4.errors import ConfigError
from tests.support.engines import engine_on, tiny_recipe
from tests.support.ranks import RankPool
from tests.support.waiting import LONG_SECONDS

_TP2, _PP2 = "parallel.tensor=2", "parallel.pipeline=2"
LAYOUTS = {
    "one process": (),
    "tp2xpp2": (_TP2, _PP2),
    "cp2": ("parallel.context=2",),
    "tp2xcp2+sp": (_TP2, "parallel.context=2", "parallel.sequence=true"),
    "pp2-vpp2": (_PP2, "parallel.virtual_pipeline=2", "parallel.overlap_p2p=true"),
}
PROMPT = (5, 17, 3, 80, 41)
CALLS = {
    "greedy": {"max_tokens": 12, "temperature": 0.0, "seed": 0},
    "drawn": {"max_tokens": 12, "temperature": 1.0, "seed": 0},
    "drawn otherwise": {"max_tokens": 12, "temperature": 1.0, "seed": 1},
    "small vocabulary": {"max_tokens": 12, "temperature": 2.0, "seed": 0, "vocab_size": 16},
}
TEMPERATURE = 0.5
BEGINNING = "Every process"
TEXT = "Every process has the same words: naïve Straße 你好 👩‍👩‍👧 def f(x): return x ** 2\n"


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    with RankPool(4) as ranks:
        yield ranks


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(train_bpe([TEXT * 8, Path(__file__).read_text(encoding="utf-8")], 512))


@pytest.fixture(scope="module")
def checkpoint(pool, tokenizer, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("generate")
    (directory / "bpe.tiktoken").write_bytes(rank_file_bytes(tokenizer.mergeable_ranks))
    pool.run(save_tiny, directory, tokenizer.vocab_size)
    return directory / "step_0000000"


@pytest.fixture(scope="module")
def drawn(pool) -> dict[str, list[dict[str, list[int]]]]:
    """{layout: the tokens of every call, as each rank yields them}."""
    outcomes = {name: pool.run(run_calls, layout) for name, layout in LAYOUTS.items()}
    return {name: [c for c in by_rank if c is not None] for name, by_rank in outcomes.items()}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_tokens_are_those_of_one_process_on_every_rank(drawn, layout):
    for calls in drawn[layout]:
        assert calls == drawn["one process"][0]


def test_calls_do_what_they_ask(drawn):
    calls = drawn["one process"][0]

    assert {len(tokens) for tokens in calls.values()} == {12}
    assert len({tuple(tokens) for tokens in calls.values()}) == len(CALLS)
    assert max(calls["small vocabulary"]) < 16 <= max(calls["drawn"])


def test_draws_follow_the_softmax_at_the_temperature(pool):
    """One-token texts of many seeds against the model's own probabilities."""
    logits_V, draws = pool.run(draw_often, 600)[0]
    # Chi-squared with 3 degrees of freedom exceeds 21.1 once in 10,000 times.
    statistics = {t: _chi_squared((logits_V / t).softmax(-1), draws) for t in (0.25, 0.5, 1.0)}

    assert statistics[TEMPERATURE] < 21.1
    assert min(statistics[0.25], statistics[1.0]) > 21.1


def _chi_squared(probabilities_V: torch.Tensor, draws: list[int]) -> float:
    """Over four groups of tokens, from the unlikely to the likely, of about equal probability."""
    order = probabilities_V.argsort()
    groups = (probabilities_V[order].cumsum(0) * 4).long().clamp(max=3)
    counts = torch.bincount(torch.tensor(draws), minlength=len(order)).float()
    expected = torch.zeros(4).index_add(0, groups, probabilities_V[order]) * len(draws)
    found = torch.zeros(4).index_add(0, groups, counts[order])
    return float(((found - expected) ** 2 / expected).sum())


def test_generation_ends_after_a_stop_token(pool, drawn):
    whole = drawn["one process"][0]["greedy"]
    stop = whole[7]
    found = pool.run(run_one, PROMPT, {**CALLS["greedy"], "stop_ids": frozenset({stop})})[0]

    assert found == whole[: whole.index(stop) + 1]


@pytest.mark.parametrize(
    ("prompt", "change", "message"),
    [
        ((), {}, "the prompt has no token"),
        (PROMPT, {"max_tokens": 60}, "a prompt of 5 tokens and 60 new ones exceed the model's 64"),
        (PROMPT, {"vocab_size": 97}, "the tokenizer has 97 ids, model.vocab_size=96"),
    ],
)
def test_impossible_calls_are_refused(pool, prompt, change, message):
    error, text = pool.run(run_one, prompt, CALLS["greedy"] | change)[0]

    assert error is ConfigError
    assert message in text


def test_command_streams_text_to_stdout_and_says_the_layout(pool, checkpoint):
    code, text, said = pool.run(command, (*arguments(checkpoint), "--max-tokens=12"))[0]
    again = pool.run(command, (*arguments(checkpoint.parent), "--max-tokens=12"))[0]

    assert code == 0, said
    assert text.startswith(BEGINNING)
    assert text.endswith("\n")
    assert len(text) > len(BEGINNING) + 1
    assert "platform: cpu over gloo, 1 processes" in said
    assert "layout: tensor 1, pipeline 1, context 1, data 1" in said
    assert again == (code, text, said)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("parallel.tensor=3", "parallel.tensor=3 does not divide"),
        ("model.num_layers=4", "model.num_layers belong to what"),
        ("tokenizer.path=absent", "tokenizer ranks absent cannot be read"),
        ("--max-tokens=100", "and 100 new ones exceed the model's 64"),
        ("--prompt=", "the prompt has no token"),
    ],
)
def test_wrong_input_is_one_line(pool, checkpoint, change, message):
    code, text, said = pool.run(command, (*arguments(checkpoint), change))[0]

    assert code == 2
    assert message in said.splitlines()[-1]
    assert text in ("", BEGINNING)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["tp2xpp2", "tp2xcp2+sp"])
def test_command_starts_its_processes_and_prints_the_same_text(pool, checkpoint, layout):
    options = (*arguments(checkpoint), "--max-tokens=12", "--temperature=1", "--seed=3")
    ran = subprocess.run(
        [sys.executable, "-m", "phi4", *options, *LAYOUTS[layout]],
        capture_output=True,
        text=True,
        timeout=LONG_SECONDS,
    )

    assert ran.returncode == 0, ran.stderr
    assert ran.stdout == pool.run(command, options)[0][1]
    assert "4 processes" in ran.stderr
    assert "layout: tensor 2" in ran.stderr


def arguments(checkpoint: Path) -> tuple[str, ...]:
    return ("generate", str(checkpoint), f"--prompt={BEGINNING}")


# What follows runs in the ranks.


def run_calls(rank: int, world_size: int, layout: tuple[str, ...]) -> dict[str, list[int]] | None:
    with engine_on(rank, tiny_recipe("model.num_layers=4", *layout), trains=False) as engine:
        if engine is None:
            return None
        return {name: list(generate(engine, PROMPT, **call)) for name, call in CALLS.items()}


def run_one(
    rank: int, world_size: int, prompt: tuple[int, ...], call: dict
) -> list[int] | tuple[type, str] | None:
    """The tokens, or what was raised."""
    with engine_on(rank, tiny_recipe("model.num_layers=4"), trains=False) as engine:
        if engine is None:
            return None
        try:
            return list(generate(engine, prompt, **call))
        except Exception as error:
            return type(error), str(error)


def draw_often(rank: int, world_size: int, times: int) -> tuple[torch.Tensor, list[int]] | None:
    """The model's logits of the next token, and draws with as many seeds."""
    with engine_on(rank, tiny_recipe("model.num_layers=1"), trains=False) as engine:
        if engine is None:
            return None
        tokens = np.array([PROMPT])
        batch = build_batch(tokens, tokens, np.zeros(tokens.shape), eod_id=-1)
        logits_V = engine.logits([batch])[0][0, -1]
        call = {"max_tokens": 1, "temperature": TEMPERATURE}
        draws = [next(generate(engine, PROMPT, seed=seed, **call)) for seed in range(times)]
        return logits_V, draws


def command(rank: int, world_size: int, words: tuple[str, ...]) -> tuple[int, str, str] | None:
    """`phi4 WORDS` in rank 0: exit code, stdout, stderr."""
    if rank:
        return None
    code, out, err = 0, io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main(words)
        except SystemExit as end:
            code = int(end.code or 0)
        finally:
            # A command that fails ends its process and leaves this to the end.
            destroy_layout()
    return code, out.getvalue(), err.getvalue()


def save_tiny(rank: int, world_size: int, directory: Path, vocab_size: int) -> None:
    recipe = tiny_recipe(
        f"model.vocab_size={vocab_size}",
        "tokenizer.kind=bpe",
        f"tokenizer.path={directory / 'bpe.tiktoken'}",
    )
    files = {"recipe.toml": dump_toml(recipe)}
    with engine_on(rank, recipe, trains=False) as engine:
        if engine is not None:
            save_checkpoint(engine, directory, 0, form="none", keep=1, files=files, data={})
