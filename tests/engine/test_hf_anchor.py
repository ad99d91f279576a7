"""Logits, gradients and greedy text equal transformers' Phi3ForCausalLM in every layout."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import Phi3ForCausalLM

from phi4.config import dump_toml
from phi4.convert import read_hf
from phi4.convert.checkpoint import export_checkpoint, import_hf
from phi4.data.vocabulary.bpe import train_bpe
from phi4.data.vocabulary.tokenizer import rank_file_bytes
from phi4.engine.checkpoint import load_checkpoint, save_checkpoint, verify_checkpoint
from phi4.engine.platform import connect, disconnect
from tests.support.anchor import (
    MODEL,
    NEW_TOKENS,
    RANKS,
    Anchor,
    Found,
    anchor_recipe,
    batch_of,
    check_gradients,
    check_logits,
    check_single,
    check_split,
    last,
    make_anchor,
    measure,
)
from tests.support.engines import engine_on
from tests.support.ranks import RankPool

LAYOUTS = {
    "tp2xpp2": {"tensor": 2, "pipeline": 2},
    "tp2xpp2+sp": {"tensor": 2, "pipeline": 2, "sequence": True},
    "tp2xcp2+sp": {"tensor": 2, "context": 2, "sequence": True},
}


@pytest.fixture(scope="module")
def anchor(tmp_path_factory) -> Anchor:
    return make_anchor(tmp_path_factory.mktemp("anchor") / "hf")


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
        recipe = anchor_recipe(work_dir, parallel=parallel)
        with engine_on(rank, recipe, trains=False) as live:
            if live is not None:
                live.load_whole_parameters(dict(read_hf(hf_dir)[1]()))
                live_logits = last(live.logits([batch_of(tokens)]))
        with engine_on(rank, recipe) as engine:
            if engine is None:
                continue
            manifest = verify_checkpoint(engine, checkpoint)
            load_checkpoint(engine, checkpoint, manifest, optimizer=False)
            files = {"recipe.toml": dump_toml(recipe)}
            save_checkpoint(engine, work_dir / name, 0, form="none", keep=1, files=files, data={})
            found[name] = replace(measure(engine, tokens), live_logits=live_logits)
    return found


def export(rank: int, world_size: int, checkpoint: Path, out: Path) -> None:
    if rank == 0:
        export_checkpoint(checkpoint, out, connect("cpu"))
