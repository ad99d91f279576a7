"""The outside anchor: logits, gradients and greedy text equal transformers' Phi3ForCausalLM.

Weights are far from initial ones (matrices at std 0.1, norm weights 0.5 to 1.5), so that no wrong
norm, rotation or head order hides behind small numbers; `MUTANTS` shows that none does.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import Phi3Config, Phi3ForCausalLM

from phi4.config import ModelConfig, Recipe, dump_toml, parse_recipe
from phi4.convert import read_hf
from phi4.convert.checkpoint import export_checkpoint, import_hf
from phi4.data.batch import Batch
from phi4.data.bpe import train_bpe
from phi4.data.tokenizer import rank_file_bytes
from phi4.engine import attention
from phi4.engine.attention import rotate_and_split
from phi4.engine.checkpoint import load_checkpoint, save_checkpoint, verify_checkpoint
from phi4.engine.engine import Engine
from phi4.engine.generate import generate
from phi4.engine.model import global_parameters, unshard
from phi4.engine.platform import connect, disconnect
from phi4.model.names import block_qkv, group_qkv, to_megatron
from phi4.stages.pretrain import NextToken
from tests.support.engines import engine_on
from tests.support.ranks import RankPool

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
LAYOUTS = {
    "tp2xpp2": {"tensor": 2, "pipeline": 2},
    "tp2xpp2+sp": {"tensor": 2, "pipeline": 2, "sequence": True},
    "tp2xcp2+sp": {"tensor": 2, "context": 2, "sequence": True},
}
NUM_ROWS, LENGTH = 2, 64
DOCUMENTS = (0, 23, 64)
"""Where the documents of a packed row begin, and its end."""
SINGLE_TOLERANCE = 1e-6
"""Of max |logit|."""
GRADIENT_TOLERANCE = 1e-5
"""Relative L2 error of a tensor."""
RANKS = "bpe.tiktoken"
PROMPT_TOKENS, NEW_TOKENS = 8, 24

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


@pytest.fixture(scope="module")
def anchor(tmp_path_factory) -> Anchor:
    config = Phi3Config(
        vocab_size=MODEL.vocab_size,
        hidden_size=MODEL.hidden_size,
        intermediate_size=MODEL.intermediate_size,
        num_hidden_layers=MODEL.num_layers,
        num_attention_heads=MODEL.num_attention_heads,
        num_key_value_heads=MODEL.num_key_value_heads,
        max_position_embeddings=MODEL.max_position_embeddings,
        original_max_position_embeddings=MODEL.max_position_embeddings,
        rms_norm_eps=MODEL.rms_norm_eps,
        rope_theta=MODEL.rope_theta,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    reference = Phi3ForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in reference.parameters():
            if parameter.dim() == 1:
                parameter.uniform_(0.5, 1.5, generator=generator)
            else:
                parameter.normal_(0, 0.1, generator=generator)
    directory = tmp_path_factory.mktemp("anchor") / "hf"
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


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    with RankPool(4) as ranks:
        yield ranks


@pytest.fixture(scope="module")
def work_dir(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("checkpoints")
    ranks = train_bpe([Path(__file__).read_text(encoding="utf-8")], MODEL.vocab_size)
    (directory / RANKS).write_bytes(rank_file_bytes(ranks))
    return directory


@pytest.fixture(scope="module")
def found(pool, anchor, work_dir) -> dict[str, Found]:
    """Every layout, from the checkpoint that `from-hf` made of the anchor's directory."""
    outcomes = pool.run(run_layouts, anchor.directory, work_dir, anchor.tokens)
    return {name: _joined([o[name] for o in outcomes if name in o]) for name in outcomes[0]}


def _joined(parts: list[Found]) -> Found:
    """What the last stage has, with the gradients of all stages."""
    gradients = {name: tensor for part in parts for name, tensor in part.gradients.items()}
    return replace(parts[-1], gradients=gradients)


def test_one_process_has_the_logits(found, anchor):
    check_single(found["one process"].logits, anchor.logits)
    check_single(found["one process"].live_logits, anchor.logits)


def test_packed_documents_have_the_logits_of_each_alone(found, anchor):
    check_single(found["one process"].packed_logits, anchor.packed_logits)
    for layout in LAYOUTS:
        check_logits(found[layout].packed_logits, anchor.packed_logits, 2 * anchor.rounding)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_split_model_has_the_logits_from_a_checkpoint_and_live(found, anchor, layout):
    check_split(found[layout].logits, anchor)
    check_split(found[layout].live_logits, anchor)


@pytest.mark.parametrize("layout", ["one process", *LAYOUTS])
def test_gradients_of_the_mean_loss(found, anchor, layout):
    check_gradients(found[layout].gradients, anchor)


@pytest.mark.parametrize("layout", ["one process", *LAYOUTS])
def test_greedy_text_is_that_of_generate(found, anchor, layout):
    assert len(set(anchor.greedy)) > NEW_TOKENS // 2
    assert found[layout].greedy == anchor.greedy


def test_checkpoint_of_a_split_model_opens_in_transformers(pool, found, anchor, work_dir):
    out = work_dir / "exported"
    pool.run(export, work_dir / "tp2xpp2" / "step_0000000", out)
    opened = Phi3ForCausalLM.from_pretrained(out, dtype=torch.float32)

    with torch.no_grad():
        assert torch.equal(opened(anchor.tokens[:, :-1]).logits, anchor.logits)


@pytest.fixture(scope="module")
def mutated(pool, anchor) -> dict[str, Found]:
    return pool.run(run_mutants, anchor.directory, anchor.tokens)[0]


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


# What follows runs in the ranks.


def run_layouts(
    rank: int, world_size: int, hf_dir: Path, work_dir: Path, tokens: torch.Tensor
) -> dict[str, Found]:
    """What this rank has of every layout."""
    if rank == 0:
        import_hf(hf_dir, work_dir / "imported", connect("cpu"))
        disconnect()
    checkpoint, found = work_dir / "imported" / "step_0000000", {}
    for name, parallel in ({"one process": {}} | LAYOUTS).items():
        recipe = _recipe(work_dir, parallel=parallel)
        with engine_on(rank, recipe, trains=False) as live:
            if live is not None:
                live.load_whole_parameters(dict(read_hf(hf_dir)[1]()))
                live_logits = _last(live.logits([_batch(tokens)]))
        with engine_on(rank, recipe) as engine:
            if engine is None:
                continue
            manifest = verify_checkpoint(engine, checkpoint)
            load_checkpoint(engine, checkpoint, manifest, optimizer=False)
            files = {"recipe.toml": dump_toml(recipe)}
            save_checkpoint(engine, work_dir / name, 0, form="none", keep=1, files=files, data={})
            found[name] = replace(_measure(engine, tokens), live_logits=live_logits)
    return found


def export(rank: int, world_size: int, checkpoint: Path, out: Path) -> None:
    if rank == 0:
        export_checkpoint(checkpoint, out, connect("cpu"))


def run_mutants(rank: int, world_size: int, hf_dir: Path, tokens: torch.Tensor) -> dict[str, Found]:
    if rank:
        return {}
    found = {}
    for name, mutant in MUTANTS.items():
        whole = {key: tensor.clone() for key, tensor in read_hf(hf_dir)[1]()}
        mutant.change(whole)
        with (
            engine_on(rank, _recipe(hf_dir, model=mutant.model.model_dump())) as engine,
            patch.object(attention, "rotate_and_split", mutant.rotation),
        ):
            engine.load_whole_parameters(whole)
            found[name] = _measure(engine, tokens)
    return found


def _measure(engine: Engine, tokens: torch.Tensor) -> Found:
    prompt = tokens[0, :PROMPT_TOKENS].tolist()
    return Found(
        logits=_last(engine.logits([_batch(tokens)])),
        greedy=list(generate(engine, prompt, max_tokens=NEW_TOKENS, temperature=0.0, seed=0)),
        gradients=_gradients(engine, tokens),
        packed_logits=_last(engine.logits([_batch(tokens, DOCUMENTS)])),
    )


def _gradients(engine: Engine, tokens: torch.Tensor) -> Tensors:
    """Whole gradients of this stage, from a step with learning rate 0 and no clipping."""
    engine.train_step([_batch(tokens)], NextToken(), learning_rate=0.0)
    return {
        name: unshard(parameter.main_grad, parameter, engine.layout).clone()
        for name, parameter in global_parameters(engine.bare_chunks)
    }


def _last(logits: list[torch.Tensor]) -> torch.Tensor | None:
    return logits[0] if logits else None


def _recipe(work_dir: Path, **sections: dict) -> Recipe:
    tree = {
        "model": MODEL.model_dump(),
        "tokenizer": {"kind": "bpe", "path": str(work_dir / RANKS)},
        "data": {"sequence_length": LENGTH, "unit_tokens": LENGTH},
        "batch": {"global_batch_size": NUM_ROWS, "micro_batch_size": NUM_ROWS},
        "optim": {"clip_grad": 0.0},
        "precision": {"dtype": "fp32"},
    }
    return parse_recipe(tree | sections)


def _batch(tokens: torch.Tensor, documents: tuple[int, ...] = (0, LENGTH)) -> Batch:
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
