"""A search on the real engine, in one process and in a layout: same draws, same files.

The model is a Markov chain whose pivots are known.
"""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from phi4.data.vocabulary.tokenizer import Tokenizer
from phi4.pts.search.command import Search, search_and_write
from phi4.pts.search.drawing import DrawOptions
from phi4.pts.search.rows import read_pivots
from phi4.pts.search.settings import SearchMode, settings_of
from phi4.sampling.questions import KeyedQuestion
from tests.pts.search.planted import LastLetterOracle
from tests.support.engines import engine_on
from tests.support.markov import make_markov, markov_recipe
from tests.support.ranks import pool_fixture

pytestmark = pytest.mark.slow

TOKENIZER = Tokenizer({bytes((letter,)): index for index, letter in enumerate(b"gbRW" + b"0123")})
GOOD, BAD, RIGHT, WRONG, FIRST, SECOND = range(6)
CHANCE = {GOOD: 0.9, BAD: 0.25}
LAYOUTS = {"one process": (), "tp2": ("parallel.tensor=2",)}


def chain() -> torch.Tensor:
    """Log-probabilities: good or bad behind a question, right or wrong by that, then the end."""
    size = TOKENIZER.vocab_size
    chances = torch.full((size, size), 1e-12, dtype=torch.float64)
    chances[:, TOKENIZER.im_end_id] = 1.0
    for start in (FIRST, SECOND):
        chances[start] = 1e-12
        chances[start, [GOOD, BAD]] = torch.tensor([0.5, 0.5], dtype=torch.float64)
    for token, chance in CHANCE.items():
        chances[token] = 1e-12
        chances[token, RIGHT], chances[token, WRONG] = chance, 1 - chance
    return (chances / chances.sum(-1, keepdim=True)).log()


pool = pool_fixture(2)


def test_layouts_find_the_same_pivots(pool, tmp_path) -> None:
    found = {}
    for name, layout in LAYOUTS.items():
        directory = tmp_path / name
        pool.run(in_ranks, layout, search_chain, directory)
        found[name] = (directory / "pivots.jsonl").read_bytes()
        pivots = list(read_pivots(directory / "pivots.jsonl"))
        assert {(one.token, one.sign) for one in pivots if one.position == 0} == {
            (GOOD, "raises"),
            (BAD, "lowers"),
        }
        for one in pivots:
            assert one.q == pytest.approx(dict(enumerate((0.5, 0.5))).get(one.token, one.q))
            assert one.counterpart is not None
    assert found["one process"] == found["tp2"]


# What follows runs in the ranks.


def in_ranks(
    rank: int, world_size: int, layout: tuple[str, ...], use: Callable, directory: Path
) -> None:
    from phi4.engine.generation.generator import CacheSize, Generator
    from phi4.sampling.local import LocalSampler

    size = TOKENIZER.vocab_size
    with engine_on(rank, markov_recipe(*layout, vocab_size=size), trains=False) as engine:
        if engine is None:
            return
        make_markov(engine, chain())
        with Generator(engine, CacheSize(200, 8), "weights", num_ids=size) as generator:
            if not generator.leads:
                return generator.follow()
            sampler = LocalSampler(generator, TOKENIZER)
            use(sampler, directory)
            sampler.close()


def search_chain(sampler, directory: Path) -> None:
    questions = tuple(KeyedQuestion(f"q{i}", (i,), "", "R", "") for i in (FIRST, SECOND))
    search = Search(
        questions=questions,
        settings=settings_of(SearchMode.DEFAULT, seed=1),
        options=DrawOptions(seed=1, max_tokens=8),
        model="chain",
        oracle="last letter",
        directory=directory,
    )
    search_and_write(search, sampler, TOKENIZER, LastLetterOracle())
