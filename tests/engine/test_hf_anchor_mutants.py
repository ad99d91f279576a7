"""The checks against transformers reject a model with any one thing wrong."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from phi4.config import ModelConfig
from phi4.convert import read_hf
from phi4.engine.model import attention
from phi4.engine.model.attention import rotate_and_split
from phi4.model.names import block_qkv, group_qkv
from tests.support.anchor import (
    MODEL,
    Anchor,
    Found,
    Tensors,
    anchor_recipe,
    check_gradients,
    check_single,
    check_split,
    make_anchor,
    measure,
)
from tests.support.engines import engine_on
from tests.support.ranks import run_ranks


@pytest.fixture(scope="module")
def anchor(tmp_path_factory) -> Anchor:
    return make_anchor(tmp_path_factory.mktemp("anchor") / "hf")


@pytest.fixture(scope="module")
def mutated(anchor) -> dict[str, Found]:
    return run_ranks(1, run_mutants, anchor.directory, anchor.tokens)[0]


def interleaved_rotation(
    qkv_SBKGD: torch.Tensor, cos_SBD: torch.Tensor, sin_SBD: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    pairs = qkv_SBKGD[..., :-1, :].unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)
    return rotate_and_split(torch.cat((pairs, qkv_SBKGD[..., -1:, :]), -2), cos_SBD, sin_SBD)


def leave(weights: Tensors) -> None:
    pass


def swap_gate_and_up(weights: Tensors) -> None:
    name = "decoder.layers.2.mlp.linear_fc1.weight"
    weights[name] = torch.cat(weights[name].chunk(2)[::-1])


def swap_key_value_heads(weights: Tensors) -> None:
    name = "decoder.layers.1.self_attention.linear_qkv.weight"
    width, heads = MODEL.head_dim, MODEL.num_attention_heads
    queries, *kv = block_qkv(weights[name], MODEL).split([heads * width, *[width] * 4])
    weights[name] = group_qkv(torch.cat([queries, kv[1], kv[0], kv[3], kv[2]]), MODEL)


def lose_a_norm(weights: Tensors) -> None:
    weights["decoder.layers.3.pre_mlp_layernorm.weight"].fill_(1.0)


@dataclass(frozen=True)
class Mutant:
    """One thing wrong."""

    model: ModelConfig = MODEL
    change: Callable[[Tensors], None] = leave
    rotation: Callable[..., tuple[torch.Tensor, ...]] = rotate_and_split


MUTANTS = {
    "none": Mutant(),
    "rope base": Mutant(model=MODEL.model_copy(update={"rope_theta": 10_000.0})),
    "interleaved rope": Mutant(rotation=interleaved_rotation),
    "eps 1e-6": Mutant(model=MODEL.model_copy(update={"rms_norm_eps": 1e-6})),
    "swapped gate and up": Mutant(change=swap_gate_and_up),
    "swapped key-value heads": Mutant(change=swap_key_value_heads),
    "one norm weight lost": Mutant(change=lose_a_norm),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_checks_reject_every_mutant_and_nothing_else(mutated, anchor, mutant):
    logits, gradients = mutated[mutant].logits, mutated[mutant].gradients
    checks = [
        lambda: check_single(logits, anchor.logits),
        lambda: check_split(logits, anchor),
        lambda: check_gradients(gradients, anchor),
    ]

    for check in checks:
        if mutant == "none":
            check()
        else:
            with pytest.raises(AssertionError, match="off by"):
                check()


# What follows runs in the rank.


def run_mutants(rank: int, world_size: int, hf_dir: Path, tokens: torch.Tensor) -> dict[str, Found]:
    found = {}
    for name, mutant in MUTANTS.items():
        whole = {key: tensor.clone() for key, tensor in read_hf(hf_dir)[1]()}
        mutant.change(whole)
        with (
            engine_on(rank, anchor_recipe(hf_dir, model=mutant.model.model_dump())) as engine,
            patch.object(attention, "rotate_and_split", mutant.rotation),
        ):
            engine.load_whole_parameters(whole)
            found[name] = measure(engine, tokens)
    return found
