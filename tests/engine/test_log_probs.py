"""Log-probabilities equal transformers' in every layout, on every rank, each document alone."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from phi4.convert import read_hf
from phi4.data.stream.batch import Batch
from phi4.engine.engine import RowLogProbs
from tests.support.anchor import DOCUMENTS, Anchor, anchor_recipe, batch_of, make_anchor
from tests.support.engines import engine_on
from tests.support.ranks import RankPool

TOLERANCE = 1e-5
TP2, PP2, CP2 = {"tensor": 2}, {"pipeline": 2}, {"context": 2}
SP, RING = {"sequence": True}, {"context_attention": "ring"}
VPP2 = {**PP2, "virtual_pipeline": 2, "overlap_p2p": True}
ONE_PASS, CHUNKED = "one_pass", "recompute"
LAYOUTS = {
    "tp2xcp2+sp, ring, one pass": (TP2 | CP2 | SP | RING, ONE_PASS),
    "pp2-vpp2xcp2": (VPP2 | CP2, "logits"),
}
REST = {
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


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    with RankPool(4) as ranks:
        yield ranks


@pytest.mark.parametrize(
    "layout", [*LAYOUTS, *(pytest.param(name, marks=pytest.mark.slow) for name in REST)]
)
def test_log_probs_are_those_of_transformers(layout, pool, anchor):
    batches = batches_of(anchor)
    logits = (anchor.packed_logits, anchor.logits.flip(0), anchor.packed_logits.flip(0))
    parallel, form = (LAYOUTS | REST)[layout]
    outcomes = pool.run(run_log_probs, anchor.directory, batches, parallel, form)
    for found in outcomes:
        for ours, batch, logits_BSV in zip(found or (), batches, logits, strict=bool(found)):
            check(ours, batch, torch.log_softmax(logits_BSV.double(), dim=-1).numpy())
    assert outcomes[0]


def check(found: RowLogProbs, batch: Batch, truth_BSV: np.ndarray) -> None:
    assert found.labels.dtype == np.float32
    exact = np.take_along_axis(truth_BSV, batch.labels[..., None], -1)[..., 0]
    np.testing.assert_allclose(found.labels, exact, rtol=0, atol=TOLERANCE)
    if batch.alternative_labels is None:
        assert found.alternative_labels is None
        return
    second = batch.alternative_labels
    exact = np.take_along_axis(truth_BSV, np.maximum(second, 0)[..., None], -1)[..., 0]
    np.testing.assert_allclose(
        found.alternative_labels, np.where(second < 0, 0, exact), rtol=0, atol=TOLERANCE
    )


def batches_of(anchor: Anchor) -> list[Batch]:
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
