"""Decoding with a cache gives the tokens of transformers in every layout, and its bf16 is as good.

The full form is eight prompts of 1 to 400 tokens with 64 new tokens each, from a Hugging Face
directory and from a checkpoint of another layout.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch
from transformers import Phi3ForCausalLM

from phi4.config import ModelConfig, dump_toml
from phi4.convert import read_hf
from phi4.engine.checkpoint import save_checkpoint
from phi4.engine.generation.generator import CacheSize, Generator
from phi4.engine.generation.scheduler import StepLimits, TokenDrawn
from tests.support.anchor import MODEL, anchor_recipe
from tests.support.engines import engine_on
from tests.support.generation import Asked, collect, generate
from tests.support.hugging_face import drawn_phi3
from tests.support.ranks import RankPool


@dataclass(frozen=True)
class Form:
    """Prompts, and how much a step computes of them: the longer ones take several chunks."""

    model: ModelConfig
    lengths: tuple[int, ...]
    num_new: int
    step_tokens: int


SMALL = Form(MODEL, lengths=(1, 5, 17, 17, 60), num_new=12, step_tokens=30)
FULL = Form(
    MODEL.model_copy(update={"num_layers": 6, "max_position_embeddings": 512}),
    lengths=(1, 2, 7, 16, 17, 63, 200, 400),
    num_new=64,
    step_tokens=96,
)
ONE, TP2, PP2, TP2_PP2 = {}, {"tensor": 2}, {"pipeline": 2}, {"tensor": 2, "pipeline": 2}
SP = {"sequence": True}
LAYOUTS = {
    "one process": (SMALL, ONE),
    "tp2xpp2": (SMALL, TP2_PP2),
    "tp2+sp": (SMALL, TP2 | SP),
}
LAYOUTS_TOO = {
    "tp2xcp2+sp": (SMALL, TP2 | SP | {"context": 2}),
    "pp2-vpp2": (SMALL, PP2 | {"virtual_pipeline": 2, "overlap_p2p": True}),
    "full, one process": (FULL, ONE),
    "full, tp2": (FULL, TP2),
    "full, pp2": (FULL, PP2),
    "full, tp2xpp2": (FULL, TP2_PP2),
    "full, uneven pp4": (FULL, {"pipeline": 4, "layers_per_stage": (1, 2, 2, 1)}),
}
WRITTEN = {"pipeline": 3, "layers_per_stage": (1, 3, 2)}
"""The layout of the checkpoint; no other one is its."""
BLOCK_TOKENS = 8
LEAST_MARGIN = 1e-4
"""Of the largest logit, between the first and the second: a hundred times what fp32 rounds off."""


@dataclass(frozen=True)
class Reference:
    """What transformers generates."""

    directory: Path
    prompts: list[list[int]]
    greedy: list[list[int]]


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    with RankPool(4) as ranks:
        yield ranks


@pytest.fixture(scope="module")
def reference_of(tmp_path_factory) -> Callable[[Form], Reference]:
    return cache(lambda form: make_reference(form, tmp_path_factory.mktemp("reference")))


@pytest.fixture(scope="module")
def checkpoint(pool, reference_of, tmp_path_factory) -> Path:
    """The full form's model as a training layout writes it."""
    root = tmp_path_factory.mktemp("checkpoints")
    return pool.run(save, reference_of(FULL).directory, root)[0]


def make_reference(form: Form, directory: Path) -> Reference:
    generator = torch.Generator().manual_seed(1)
    model = drawn_phi3(form.model, generator)
    model.save_pretrained(directory)
    end = form.model.vocab_size
    prompts = [torch.randint(3, end, (n,), generator=generator).tolist() for n in form.lengths]
    greedy = []
    for prompt in prompts:
        found = model.generate(
            torch.tensor([prompt]),
            max_new_tokens=form.num_new,
            do_sample=False,
            eos_token_id=None,
            output_logits=True,
            return_dict_in_generate=True,
        )
        greedy.append(found.sequences[0, len(prompt) :].tolist())
        logits_TV = torch.cat(found.logits)
        first_T, second_T = logits_TV.topk(2).values.unbind(-1)
        margin = float((first_T - second_T).min() / logits_TV.abs().max())
        assert margin > LEAST_MARGIN, f"a near tie ({margin:.1e}): take another seed"
    return Reference(directory, prompts, greedy)


@pytest.mark.parametrize(
    "layout", [*LAYOUTS, *(pytest.param(name, marks=pytest.mark.slow) for name in LAYOUTS_TOO)]
)
def test_greedy_tokens_of_a_mixed_batch_are_those_of_transformers(
    layout, pool, reference_of, request
):
    form, parallel = (LAYOUTS | LAYOUTS_TOO)[layout]
    reference = reference_of(form)
    sources = [None] if form is SMALL else [None, request.getfixturevalue("checkpoint")]
    for source in sources:
        outcomes = pool.run(run_greedy, form, reference, parallel, source)
        steps = outcomes[0]

        assert all(other == steps for other in outcomes if other is not None)
        found = collect([event for events in steps for event in events], len(form.lengths))
        assert [one["tokens"] for one in found] == [[tokens] for tokens in reference.greedy]
        drawn = [[e.drawn for e in events if isinstance(e, TokenDrawn)] for events in steps]
        # Stages share the samples.
        assert max(map(len, drawn)) >= len(form.lengths) // parallel.get("pipeline", 1)
        for one in (one for drawn_at_once in drawn for one in drawn_at_once):
            assert one.top[0] == (one.token, one.log_prob)
            assert one.top[1][1] < one.log_prob < 0 == one.sampled_log_prob


@pytest.mark.slow
@pytest.mark.parametrize("parallel", [ONE, TP2_PP2], ids=["one process", "tp2xpp2"])
def test_bf16_is_as_close_to_fp32_as_transformers_bf16(parallel, pool, reference_of):
    reference = reference_of(FULL)
    found = pool.run(run_scored, FULL, reference, parallel)[0]
    exact = log_probs_of(reference, torch.float32)
    theirs = divergence(exact, log_probs_of(reference, torch.bfloat16))

    assert 1e-6 < theirs < 1e-2
    assert divergence(exact, found) <= 2 * theirs + 1e-6


def log_probs_of(reference: Reference, dtype: torch.dtype) -> list[torch.Tensor]:
    """transformers' log-probabilities [T - 1, V] after every token but the last of each text."""
    model = Phi3ForCausalLM.from_pretrained(reference.directory, dtype=dtype)
    texts = [a + b for a, b in zip(reference.prompts, reference.greedy, strict=True)]
    with torch.no_grad():
        logits = [model(torch.tensor([text[:-1]])).logits[0] for text in texts]
    return [logits_TV.double().log_softmax(-1) for logits_TV in logits]


def divergence(exact: list[torch.Tensor], found: list[torch.Tensor]) -> float:
    """Mean over all positions of KL(exact || found), in nats."""
    exact_TV, found_TV = torch.cat(exact), torch.cat(found)
    assert exact_TV.shape == found_TV.shape
    return float((exact_TV.exp() * (exact_TV - found_TV)).sum(-1).mean())


# What follows runs in the ranks.


def save(rank: int, world_size: int, directory: Path, root: Path) -> Path | None:
    recipe = anchor_recipe(directory, model=FULL.model.model_dump(), parallel=WRITTEN)
    files = {"recipe.toml": dump_toml(recipe)}
    with engine_on(rank, recipe, trains=False) as engine:
        if engine is None:
            return None
        engine.load_whole_parameters(dict(read_hf(directory)[1]()))
        return save_checkpoint(engine, root, 0, form="none", keep=1, files=files, data={})


def run_greedy(
    rank: int,
    world_size: int,
    form: Form,
    reference: Reference,
    parallel: dict,
    checkpoint: Path | None,
):
    """What every step reports, from the checkpoint or the Hugging Face directory."""
    recipe = recipe_of(form, reference, parallel)
    with engine_on(rank, recipe, trains=False, checkpoint=checkpoint) as engine:
        if engine is None:
            return None
        if checkpoint is None:
            engine.load_whole_parameters(dict(read_hf(reference.directory)[1]()))
        with generator_of(engine, form) as generator:
            return generate(
                generator,
                [
                    Asked(prompt, max_tokens=form.num_new, temperature=0.0, num_top_log_probs=2)
                    for prompt in reference.prompts
                ],
            )


def run_scored(rank: int, world_size: int, form: Form, reference: Reference, parallel: dict):
    """bf16 log-probabilities [T - 1, V] after every token but the last of each reference text."""
    recipe = recipe_of(form, reference, parallel, precision={"dtype": "bf16"})
    with engine_on(rank, recipe, trains=False) as engine:
        if engine is None:
            return None
        engine.load_whole_parameters(dict(read_hf(reference.directory)[1]()))
        with generator_of(engine, form) as generator:
            requests = [
                Asked(
                    prompt,
                    max_tokens=form.num_new,
                    forced=greedy,
                    num_top_log_probs=form.model.vocab_size,
                    prompt_log_probs=True,
                )
                for prompt, greedy in zip(reference.prompts, reference.greedy, strict=True)
            ]
            events = [event for events in generate(generator, requests) for event in events]
        if not generator.leads:
            return None
        found = collect(events, len(requests))
        return [in_order(one["prompt_tops"] + one["tops"]) for one in found]


def in_order(tops: list[tuple[tuple[int, float], ...]]) -> torch.Tensor:
    """Log-probabilities by id [T, V] of (id, log-probability) pairs by rank."""
    pairs_TV2 = torch.tensor(tops, dtype=torch.float64)
    ids_TV, values_TV = pairs_TV2.unbind(-1)
    return torch.empty_like(values_TV).scatter_(1, ids_TV.long(), values_TV)


def recipe_of(form: Form, reference: Reference, parallel: dict, **sections: dict):
    model = form.model.model_dump()
    return anchor_recipe(reference.directory, model=model, parallel=parallel, **sections)


def generator_of(engine, form: Form) -> Generator:
    num_blocks = sum(-(-(length + form.num_new) // BLOCK_TOKENS) for length in form.lengths)
    limits = StepLimits(form.step_tokens, form.step_tokens)
    return Generator(engine, CacheSize(num_blocks, BLOCK_TOKENS), "weights", limits=limits)
