"""Decoding with a cache gives the tokens of transformers, in every layout."""

from collections.abc import Iterator

import pytest
import torch
from transformers import Phi3ForCausalLM

from phi4.convert import read_hf
from phi4.engine.generation.blocks import BlockPool
from phi4.engine.generation.decode import Decoder
from phi4.engine.generation.draws import Draw
from phi4.engine.generation.steps import Step, StepRow
from tests.support.anchor import Anchor, anchor_recipe, make_anchor
from tests.support.engines import engine_on
from tests.support.ranks import RankPool

LAYOUTS = {
    "one process": {},
    "tp2xpp2": {"tensor": 2, "pipeline": 2},
    "tp2+sp": {"tensor": 2, "sequence": True},
}
LAYOUTS_TOO = {
    "tp2xcp2+sp": {"tensor": 2, "context": 2, "sequence": True},
    "tp2": {"tensor": 2},
    "pp2": {"pipeline": 2},
    "pp2-vpp2": {"pipeline": 2, "virtual_pipeline": 2, "overlap_p2p": True},
    "uneven pp3": {"pipeline": 3, "layers_per_stage": (1, 2, 1)},
}
LENGTHS, NEW_TOKENS = (1, 5, 17, 17, 60), 12
SIZE, CHUNK = 8, 13
GREEDY = Draw(0, temperature=0.0, num_top=2)


@pytest.fixture(scope="module")
def anchor(tmp_path_factory) -> Anchor:
    return make_anchor(tmp_path_factory.mktemp("anchor") / "hf")


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(3, 512, (n,), generator=generator).tolist() for n in LENGTHS]


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    with RankPool(4) as ranks:
        yield ranks


@pytest.fixture(scope="module")
def expected(anchor, prompts) -> list[list[int]]:
    model = Phi3ForCausalLM.from_pretrained(anchor.directory, dtype=torch.float32)
    texts = [
        model.generate(
            torch.tensor([prompt]), max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None
        )
        for prompt in prompts
    ]
    return [text[0, len(p) :].tolist() for text, p in zip(texts, prompts, strict=True)]


@pytest.mark.parametrize(
    "layout", [*LAYOUTS, *(pytest.param(name, marks=pytest.mark.slow) for name in LAYOUTS_TOO)]
)
def test_greedy_tokens_of_a_mixed_batch_are_those_of_transformers(
    layout, pool, anchor, prompts, expected
):
    outcomes = pool.run(run_greedy, anchor.directory, (LAYOUTS | LAYOUTS_TOO)[layout], prompts)
    outcomes = [outcome for outcome in outcomes if outcome is not None]

    for tokens, drawn in outcomes:
        assert tokens == expected
        assert drawn == outcomes[0][1]
    for one in outcomes[0][1]:
        assert one.top[0] == (one.token, one.log_prob)
        assert one.top[1][1] < one.log_prob < 0 == one.sampled_log_prob


# What follows runs in the ranks.


def run_greedy(rank: int, world_size: int, directory, parallel: dict, prompts: list[list[int]]):
    """The new tokens of every prompt, and all that was drawn in the last step."""
    recipe = anchor_recipe(directory, parallel=parallel)
    with engine_on(rank, recipe, trains=False) as engine:
        if engine is None:
            return None
        engine.load_whole_parameters(dict(read_hf(directory)[1]()))
        return greedy(Decoder(engine, num_blocks=40, block_tokens=SIZE), prompts)


def greedy(decoder: Decoder, prompts: list[list[int]]):
    """Prompts in chunks; those that are done decode beside those that are not."""
    pool = BlockPool(40, SIZE)
    ask = {"num_samples": 1, "max_new_tokens": NEW_TOKENS, "weights_key": 0}
    held = [pool.admit(prompt, **ask) for prompt in prompts]
    texts = [list(prompt) for prompt in prompts]
    ends = [len(prompt) + NEW_TOKENS for prompt in prompts]
    while active := [i for i, text in enumerate(texts) if len(text) < ends[i]]:
        rows, copies = {}, []
        for i in active:
            start = len(held[i].tokens)
            tokens = texts[i][start : start + CHUNK]
            copies.append(pool.extend(held[i], tokens))
            draws = (GREEDY,) if len(held[i].tokens) == len(texts[i]) else ()
            rows[i] = StepRow(tokens, start, tuple(held[i].blocks), draws)
        order = sorted(active, key=lambda i: len(rows[i].tokens) > 1)
        assert not any(copies)
        drawn = decoder.run(Step([rows[i] for i in order]))
        for i, found in zip(order, drawn, strict=True):
            texts[i] += [one.token for one in found]
    new = [text[len(prompt) :] for text, prompt in zip(texts, prompts, strict=True)]
    return new, [one for found in drawn for one in found]
