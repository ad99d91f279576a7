"""Logits, log-probabilities, gradients and text equal transformers' Phi3ForCausalLM everywhere."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import Phi3ForCausalLM

from phi4.config import dump_toml
from phi4.convert import read_hf
from phi4.convert.checkpoint import export_checkpoint, import_hf
from phi4.data.stream.batch import Batch
from phi4.data.vocabulary.bpe import train_bpe
from phi4.data.vocabulary.tokenizer import rank_file_bytes
from phi4.engine.checkpoint import load_checkpoint, save_checkpoint, verify_checkpoint
from phi4.engine.platform import connect, disconnect
from phi4.engine.step_values import RowLogProbs
from tests.support.anchor import (
    DOCUMENTS,
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
from tests.support.ranks import pool_fixture

LAYOUTS = {
    "tp2xpp2": {"tensor": 2, "pipeline": 2},
    "tp2xpp2+sp": {"tensor": 2, "pipeline": 2, "sequence": True},
    "tp2xcp2+sp": {"tensor": 2, "context": 2, "sequence": True},
}

LOG_PROB_TOLERANCE = 1e-5
TP2, PP2, CP2 = {"tensor": 2}, {"pipeline": 2}, {"context": 2}
SP, RING = {"sequence": True}, {"context_attention": "ring"}
VPP2 = {**PP2, "virtual_pipeline": 2, "overlap_p2p": True}
ONE_PASS, CHUNKED = "one_pass", "recompute"
SCORED = {
    "tp2xcp2+sp, ring, one pass": (TP2 | CP2 | SP | RING, ONE_PASS),
    "pp2-vpp2xcp2": (VPP2 | CP2, "logits"),
}
SCORED_TOO = {
    "one process": ({}, "logits"),
    "one process, recompute": ({}, CHUNKED),
    "tp2": (TP2, "logits"),
    "tp2+sp": (TP2 | SP, "logits"),
    "tp2+sp, recompute": (TP2 | SP, CHUNKED),
    "pp2, one pass": (PP2, ONE_PASS),
    "cp2": (CP2, "logits"),
    "dp2": ({"data": 2}, "logits"),
    "pp4-vpp1": ({"pipeline": 4}, "logits"),
    "tp2xpp2+sp": (TP2 | PP2 | SP, CHUNKED),
}


@pytest.fixture(scope="module")
def anchor(tmp_path_factory) -> Anchor:
    return make_anchor(tmp_path_factory.mktemp("anchor") / "hf")


pool = pool_fixture(4)


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


@pytest.mark.parametrize(
    "layout", [*SCORED, *(pytest.param(name, marks=pytest.mark.slow) for name in SCORED_TOO)]
)
def test_log_probs_are_those_of_transformers(layout, pool, anchor):
    batches = scored_batches(anchor)
    logits = (anchor.packed_logits, anchor.logits.flip(0), anchor.packed_logits.flip(0))
    parallel, form = (SCORED | SCORED_TOO)[layout]
    outcomes = pool.run(run_log_probs, anchor.directory, batches, parallel, form)
    for found in outcomes:
        for ours, batch, logits_BSV in zip(found or (), batches, logits, strict=bool(found)):
            check_log_probs(ours, batch, torch.log_softmax(logits_BSV.double(), dim=-1).numpy())
    assert outcomes[0]


def check_log_probs(found: RowLogProbs, batch: Batch, truth_BSV: np.ndarray) -> None:
    assert found.labels.dtype == np.float32
    exact = np.take_along_axis(truth_BSV, batch.labels[..., None], -1)[..., 0]
    np.testing.assert_allclose(found.labels, exact, rtol=0, atol=LOG_PROB_TOLERANCE)
    if batch.alternative_labels is None:
        assert found.alternative_labels is None
        return
    second = batch.alternative_labels
    exact = np.take_along_axis(truth_BSV, np.maximum(second, 0)[..., None], -1)[..., 0]
    np.testing.assert_allclose(
        found.alternative_labels, np.where(second < 0, 0, exact), rtol=0, atol=LOG_PROB_TOLERANCE
    )


def scored_batches(anchor: Anchor) -> list[Batch]:
    """Three, so that interleaved stages have to fill up; their order shows."""
    random = np.random.default_rng(0)
    packed, swapped = batch_of(anchor.tokens, DOCUMENTS), batch_of(anchor.tokens.flip(0))
    second = random.integers(0, 512, packed.labels.shape)
    second[random.random(second.shape) < 0.8] = -1
    few = np.full_like(second, -1)
    few[0, 2] = 5
    return [
        replace(packed, alternative_labels=second),
        swapped,
        replace(batch_of(anchor.tokens.flip(0), DOCUMENTS), alternative_labels=few),
    ]


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


def run_log_probs(
    rank: int, world_size: int, directory: Path, batches: list[Batch], parallel: dict, form: str
) -> list[RowLogProbs] | None:
    recipe = anchor_recipe(directory, parallel=parallel, loss_head={"form": form})
    with engine_on(rank, recipe, trains=False) as engine:
        if engine is None:
            return None
        engine.load_whole_parameters(dict(read_hf(directory)[1]()))
        assert engine.log_probs([]) == []
        return engine.log_probs(batches)
