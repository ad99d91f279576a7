"""The outside anchor: what transformers' Phi3ForCausalLM computes, and the checks against it."""

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from transformers import Phi3ForCausalLM

from phi4.config import ModelConfig, Recipe, parse_recipe
from phi4.data.stream.batch import Batch
from phi4.engine.engine import Engine
from phi4.engine.model.gpt import global_parameters
from phi4.engine.model.tensor_parts import unshard
from phi4.model.names import to_megatron
from phi4.stages.pretrain import NextToken
from tests.support.generation import greedy
from tests.support.hugging_face import drawn_phi3

MODEL = ModelConfig(
    num_layers=4,
    hidden_size=128,
    num_attention_heads=8,
    num_key_value_heads=2,
    intermediate_size=448,
    vocab_size=512,
    max_position_embeddings=128,
    rope_theta=250_000.0,
    rms_norm_eps=1e-5,
)
NUM_ROWS, LENGTH = 2, 64
DOCUMENTS = (0, 23, 64)
"""Where the documents of a packed row begin, and its end."""
SINGLE_TOLERANCE = 1e-6
"""Of max |logit|."""
GRADIENT_TOLERANCE = 1e-5
"""Relative L2 error of a tensor."""
PROMPT_TOKENS, NEW_TOKENS = 8, 10
RANKS = "bpe.tiktoken"

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Anchor:
    """What transformers computes, under megatron-core's names."""

    directory: Path
    tokens: torch.Tensor
    """[B, S + 1]."""
    logits: torch.Tensor
    """[B, S, V], fp32."""
    packed_logits: torch.Tensor
    """The same for every document of `DOCUMENTS` alone."""
    rounding: float
    """Largest difference between its own fp32 and fp64 logits."""
    gradients: Tensors
    """Of the mean loss."""
    greedy: list[int]


@dataclass(frozen=True)
class Found:
    """What we compute in one layout."""

    logits: torch.Tensor | None
    """None on a rank that is not of the last stage, like the other logits."""
    gradients: Tensors
    greedy: list[int]
    packed_logits: torch.Tensor | None
    live_logits: torch.Tensor | None = None


def check_logits(found: torch.Tensor, expected: torch.Tensor, allowed: float) -> None:
    error = float((found - expected).abs().max())
    assert error <= allowed, f"logits are off by {error:.2e}, allowed {allowed:.2e}"


def check_single(found: torch.Tensor, expected: torch.Tensor) -> None:
    check_logits(found, expected, SINGLE_TOLERANCE * float(expected.abs().max()))


def check_split(found: torch.Tensor, anchor: Anchor) -> None:
    check_logits(found, anchor.logits, 2 * anchor.rounding)


def check_gradients(found: Tensors, anchor: Anchor) -> None:
    assert found.keys() == anchor.gradients.keys()
    errors = {
        name: float((found[name] - truth).norm() / truth.norm())
        for name, truth in anchor.gradients.items()
    }
    worst = max(errors, key=errors.__getitem__)
    assert errors[worst] <= GRADIENT_TOLERANCE, f"{worst} is off by {errors[worst]:.2e}"


def make_anchor(directory: Path) -> Anchor:
    """Draw a model, save it as transformers does, and compute everything with it."""
    generator = torch.Generator().manual_seed(1)
    reference = drawn_phi3(MODEL, generator)
    reference.save_pretrained(directory)
    tokens = torch.randint(3, MODEL.vocab_size, (NUM_ROWS, LENGTH + 1), generator=generator)
    logits = reference(tokens[:, :-1]).logits
    F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
    with torch.no_grad():
        alone = [reference(tokens[:, start:end]).logits for start, end in pairwise(DOCUMENTS)]
    return Anchor(
        directory=directory,
        tokens=tokens,
        logits=logits.detach(),
        packed_logits=torch.cat(alone, dim=1),
        rounding=_rounding(directory, tokens, logits.detach()),
        gradients=dict(
            to_megatron(name, parameter.grad, MODEL)
            for name, parameter in reference.named_parameters()
        ),
        greedy=reference.generate(
            tokens[:1, :PROMPT_TOKENS],
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            eos_token_id=None,
        )[0, PROMPT_TOKENS:].tolist(),
    )


def _rounding(directory: Path, tokens: torch.Tensor, logits: torch.Tensor) -> float:
    exact = Phi3ForCausalLM.from_pretrained(directory, dtype=torch.float64)
    with torch.no_grad():
        return float((exact(tokens[:, :-1]).logits - logits).abs().max())


def measure(engine: Engine, tokens: torch.Tensor) -> Found:
    """What this rank has, in one layout."""
    prompt = tokens[0, :PROMPT_TOKENS].tolist()
    return Found(
        logits=last(engine.logits([batch_of(tokens)])),
        greedy=greedy(engine, prompt, NEW_TOKENS),
        gradients=_gradients(engine, tokens),
        packed_logits=last(engine.logits([batch_of(tokens, DOCUMENTS)])),
    )


def _gradients(engine: Engine, tokens: torch.Tensor) -> Tensors:
    """Whole gradients of this stage, from a step with learning rate 0 and no clipping.

    torch's AdamW leaves them scaled: those of the mean loss.
    """
    engine.train_step([batch_of(tokens)], NextToken(), learning_rate=0.0)
    return {
        name: unshard(parameter.main_grad, parameter, engine.layout).clone()
        for name, parameter in global_parameters(engine.bare_chunks)
    }


def last(logits: list[torch.Tensor]) -> torch.Tensor | None:
    """Logits of the only micro-batch where this rank is of the last stage."""
    return logits[0] if logits else None


def anchor_recipe(work_dir: Path, **sections: dict) -> Recipe:
    """The anchor's recipe; sections replace its own."""
    tree = {
        "model": MODEL.model_dump(),
        "tokenizer": {"kind": "bpe", "path": str(work_dir / RANKS)},
        "data": {"sequence_length": LENGTH, "unit_tokens": LENGTH},
        "batch": {"global_batch_size": NUM_ROWS, "micro_batch_size": NUM_ROWS},
        "optim": {"clip_grad": 0.0},
        "precision": {"dtype": "fp32"},
    }
    return parse_recipe(tree | sections)


def batch_of(tokens: torch.Tensor, documents: tuple[int, ...] = (0, LENGTH)) -> Batch:
    """All tokens count; every row has documents at the same places."""
    ids, bounds = tokens.numpy(), np.array(documents)
    starts = [row * LENGTH + bounds[:-1] for row in range(NUM_ROWS)]
    positions = np.arange(LENGTH) - np.repeat(bounds[:-1], np.diff(bounds))
    return Batch(
        tokens=ids[:, :-1],
        labels=ids[:, 1:],
        loss_mask=np.ones((NUM_ROWS, LENGTH), dtype=np.float32),
        cu_seqlens=np.append(np.concatenate(starts), NUM_ROWS * LENGTH).astype(np.int32),
        positions=np.tile(positions, (NUM_ROWS, 1)),
    )
