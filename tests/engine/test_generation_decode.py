"""Decoding with a cache gives the tokens of transformers in every layout, and its bf16 is as good.

The full form is eight prompts of 1 to 400 tokens with 64 new tokens each, from a Hugging Face
directory and from a checkpoint of another layout.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch
from transformers import Phi3ForCausalLM

from phi4.config import ModelConfig, Recipe
from phi4.engine.generation.events import TokenDrawn
from tests.support.anchor import MODEL, anchor_recipe
from tests.support.decoding_ranks import run, run_scored, save
from tests.support.generation import Asked, collect
from tests.support.hugging_face import drawn_phi3
from tests.support.ranks import pool_fixture


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
LEAST_MARGIN = 1e-4
"""Of the largest logit, between the first and the second: a hundred times what fp32 rounds off."""


@dataclass(frozen=True)
class Reference:
    """What transformers generates."""

    directory: Path
    prompts: list[list[int]]
    greedy: list[list[int]]


pool = pool_fixture(4)


@pytest.fixture(scope="module")
def reference_of(tmp_path_factory) -> Callable[[Form], Reference]:
    return cache(lambda form: make_reference(form, tmp_path_factory.mktemp("reference")))


@pytest.fixture(scope="module")
def checkpoint(pool, reference_of, tmp_path_factory) -> Path:
    """The full form's model as a training layout writes it."""
    root = tmp_path_factory.mktemp("checkpoints")
    directory = reference_of(FULL).directory
    return pool.run(save, recipe_of(FULL, directory, WRITTEN), directory, root)[0]


def recipe_of(form: Form, directory: Path, parallel: dict, **sections: dict) -> Recipe:
    return anchor_recipe(directory, model=form.model.model_dump(), parallel=parallel, **sections)


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
    requests = [
        Asked(prompt, max_tokens=form.num_new, temperature=0.0, num_top_log_probs=2)
        for prompt in reference.prompts
    ]
    recipe = recipe_of(form, reference.directory, parallel)
    for source in [None] if form is SMALL else [None, request.getfixturevalue("checkpoint")]:
        outcomes = pool.run(run, recipe, reference.directory, source, requests, form.step_tokens)
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
    requests = [
        Asked(
            prompt,
            max_tokens=FULL.num_new,
            forced=greedy,
            num_top_log_probs=FULL.model.vocab_size,
            prompt_log_probs=True,
        )
        for prompt, greedy in zip(reference.prompts, reference.greedy, strict=True)
    ]
    directory = reference.directory
    recipe = recipe_of(FULL, directory, parallel, precision={"dtype": "bf16"})
    found = pool.run(run_scored, recipe, directory, None, requests, FULL.step_tokens)[0]
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
