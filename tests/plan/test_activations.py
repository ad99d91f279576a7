"""The activation formula against what autograd keeps of the engine's own modules.

The modules run on the CPU as one rank of a layout whose collectives move nothing: sizes are real,
values are not. Two things are a CUDA device's and not the CPU's: its fused RMSNorm saves the input
and one fp32 statistic per row, which a stand-in does here; and its attention of whole rows in fp32
may be torch's unfused one, which is asked for by name.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from unittest import mock

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from phi4.config import Recipe, with_overrides
from phi4.config.fp8_rules import fp8_layers
from phi4.data.stream.batch import build_batch
from phi4.engine.fake_ranks import fake_rank
from phi4.engine.model import layers, micro_batch
from phi4.engine.model.gpt import build_chunks, seed_random_states, transformer_config
from phi4.engine.model.micro_batch import MicroBatch, to_device
from phi4.engine.model.placement import in_one_block, map_tensors
from phi4.engine.precision import torch_dtype
from phi4.plan.activations import Activations

LENGTH, EOD = 64, 7
TINY = with_overrides(
    Recipe(),
    [
        "model.num_layers=3",
        "model.hidden_size=64",
        "model.num_attention_heads=8",
        "model.num_key_value_heads=4",
        "model.intermediate_size=96",
        "model.vocab_size=128",
        f"data.sequence_length={LENGTH}",
        f"data.unit_tokens={LENGTH}",
    ],
)


class DeviceRMSNorm(torch.autograd.Function):
    """Saves what the CUDA kernel saves; the gradient is of no interest."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        statistic = torch.rsqrt(x.float().pow(2).mean(dim=-1, keepdim=True) + eps)
        ctx.save_for_backward(x, statistic)
        return (x.float() * statistic).to(x.dtype) * weight

    @staticmethod
    def backward(ctx, grad):
        return grad, None, None


@pytest.fixture(autouse=True)
def device_norm(monkeypatch):
    def norm(self, x):
        return DeviceRMSNorm.apply(x, self.weight, self.eps)

    def norm_of_sum(self, x, residual):
        total = x + residual
        return norm(self, total), total

    monkeypatch.setattr(layers.RMSNorm, "forward", norm)
    monkeypatch.setattr(layers.AddRMSNorm, "forward", norm_of_sum)


@contextmanager
def rank_of(recipe: Recipe, rank: int) -> Iterator[tuple]:
    with warnings.catch_warnings(), fake_rank(recipe.parallel, rank, "cpu") as layout:
        warnings.simplefilter("ignore", UserWarning)
        seed_random_states(1)
        chunks = build_chunks(recipe, layout, transformer_config(recipe, frees_stage_outputs=True))
        yield layout, chunks


def placed(recipe: Recipe, layout, documents_per_row: int) -> MicroBatch:
    rows = recipe.batch.micro_batch_size
    tokens = np.full((rows, LENGTH), 1)
    tokens[:, LENGTH // documents_per_row - 1 :: LENGTH // documents_per_row] = EOD
    batch = build_batch(
        tokens,
        tokens,
        np.ones((rows, LENGTH)),
        eod_id=EOD,
        document_mask=recipe.data.document_mask,
    )
    with mock.patch.object(micro_batch, "on_device", in_a_block):
        return to_device(
            batch, layout, recipe.model, torch_dtype(recipe.precision), torch.device("cpu")
        )


def in_a_block(value: MicroBatch, device: torch.device) -> MicroBatch:
    """As a GPU gets it; a CPU leaves it where it is."""
    found: dict[int, torch.Tensor] = {}
    map_tensors(value, lambda x: found.setdefault(id(x), x.contiguous()))
    return in_one_block(value, found, device)


def storages(tensors) -> dict[int, int]:
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}


def batch_tensors(batch: MicroBatch) -> list[torch.Tensor]:
    documents = batch.documents
    ids = [batch.tokens_BS, batch.labels_BS, batch.loss_mask_BS]
    return [*ids, documents.cos_SBD, documents.sin_SBD]


def range_tensors(batch: MicroBatch) -> list[torch.Tensor]:
    blocks = batch.documents.visible
    return [ranges.k_starts for block in blocks for ranges in block if ranges is not None]


def kept_bytes(recipe: Recipe, rank: int = 0, documents_per_row: int = 2) -> int:
    """Storages that one micro-batch's graph keeps, without parameters and the batch itself."""
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        # Of one element is only the mask type that recompute carries along, on the host.
        if tensor.numel() > 1:
            kept.update(storages([tensor]))
        return tensor

    with rank_of(recipe, rank) as (layout, chunks):
        batch = placed(recipe, layout, documents_per_row)
        for parameter in chunks[0].parameters():
            parameter.main_grad = torch.zeros(parameter.shape)
        unfused = recipe.precision.dtype == "fp32"
        backend = sdpa_kernel([SDPBackend.MATH]) if unfused else nullcontext()
        (chunk,) = chunks
        with backend, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            log_probs = chunk.run(batch, labelled=True).labels_BS
        known = storages([*chunk.parameters(), *batch_tensors(batch), *range_tensors(batch)])
        assert log_probs.requires_grad
        return sum(size for pointer, size in kept.items() if pointer not in known)


def formula_bytes(recipe: Recipe) -> int:
    kept, num_fp8 = Activations(recipe), len(fp8_layers(recipe))
    layers = (recipe.model.num_layers - num_fp8) * kept.layer_bytes + num_fp8 * kept.fp8_layer_bytes
    return layers + kept.embedding_bytes + kept.head_bytes


LAYOUTS = {
    "one": [],
    "tensor": ["parallel.tensor=2"],
    "one group per rank": ["parallel.tensor=2", "model.num_key_value_heads=2"],
    "tensor and sequence": ["parallel.tensor=2", "parallel.sequence=true"],
    "context": ["parallel.context=2"],
    "context, ring": ["parallel.context=2", "parallel.context_attention=ring"],
    "all three": ["parallel.tensor=2", "parallel.sequence=true", "parallel.context=2"],
}


@pytest.mark.parametrize("granularity", ["none", "selective", "full"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_formula_is_what_autograd_keeps(layout: str, granularity: str) -> None:
    recipe = with_overrides(TINY, [*LAYOUTS[layout], f"recompute.granularity={granularity}"])
    # The last rank: foreign to every token's embedding.
    rank = recipe.parallel.model_parallel_size - 1
    assert kept_bytes(recipe, rank) == formula_bytes(recipe)


# Blocks of 128 leave nothing over in any of the layouts.
IN_FP8 = with_overrides(
    TINY,
    [
        "precision.fp8=torch",
        "model.hidden_size=256",
        "model.intermediate_size=256",
        "data.document_mask=false",
        "batch.micro_batch_size=8",
    ],
)


@pytest.mark.parametrize(
    ("scaling", "layout", "granularity"),
    [
        ("tensorwise", "one", "none"),
        ("rowwise", "all three", "none"),
        ("blockwise", "tensor and sequence", "none"),
        ("rowwise", "context", "selective"),
        ("blockwise", "tensor and sequence", "full"),
    ],
)
def test_formula_of_fp8_layers(scaling: str, layout: str, granularity: str) -> None:
    overrides = [*LAYOUTS[layout], f"recompute.granularity={granularity}"]
    recipe = with_overrides(IN_FP8, [*overrides, f"precision.fp8_recipe={scaling}"])
    assert kept_bytes(recipe) == formula_bytes(recipe)


def test_formula_of_fp8_layers_in_fp32() -> None:
    recipe = with_overrides(IN_FP8, ["precision.dtype=fp32", "precision.fp8_recipe=rowwise"])
    assert kept_bytes(recipe) == formula_bytes(recipe)


@pytest.mark.parametrize("form", ["recompute", "one_pass"])
@pytest.mark.parametrize("layout", ["one", "tensor and sequence"])
@pytest.mark.parametrize("rows", [1, 2])
def test_chunks_of_logits_keep_none(form: str, layout: str, rows: int) -> None:
    # Without a document mask, so that several rows are no special case of attention.
    more = [f"batch.micro_batch_size={rows}", "data.document_mask=false"]
    head = [f"loss_head.form={form}", "loss_head.chunk_tokens=24"]
    recipe = with_overrides(TINY, [*LAYOUTS[layout], *more, *head])
    assert kept_bytes(recipe) == formula_bytes(recipe)


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("rows", [1, 3])
def test_formula_without_document_mask(dtype: str, rows: int) -> None:
    recipe = with_overrides(
        TINY,
        [
            "data.document_mask=false",
            f"precision.dtype={dtype}",
            f"batch.micro_batch_size={rows}",
        ],
    )
    assert kept_bytes(recipe) == formula_bytes(recipe)


@pytest.mark.parametrize("documents_per_row", [1, 2])
@pytest.mark.parametrize("overrides", [["batch.micro_batch_size=3"], ["parallel.context=2"]])
def test_formula_is_a_close_bound_elsewhere(overrides: list[str], documents_per_row: int) -> None:
    recipe = with_overrides(TINY, overrides)
    measured, bound = kept_bytes(recipe, 0, documents_per_row), formula_bytes(recipe)
    assert 0.8 * bound < measured <= bound


def test_batch_bytes_are_what_place_puts_on_the_device() -> None:
    recipe = with_overrides(TINY, ["batch.micro_batch_size=2", "parallel.context=2"])
    with rank_of(recipe, 0) as (layout, _):
        batch = placed(recipe, layout, 2)
    # Boundaries, and three arrays of ranges for each of two chunks: less than 128 bytes each.
    documents = 7 * 128
    found = sum(storages(batch_tensors(batch)).values())
    assert found == Activations(recipe).batch_bytes + documents
