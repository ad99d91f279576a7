"""Fake ranks: any rank of any layout in this one process, without a device.

torch's fake process groups have a size and a rank and move no data, and the meta device has shapes
and no bytes. The planner thus counts megatron-core's own modules, not a second description of the
model.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from torch.testing._internal.distributed.fake_pg import FakeStore

from phi4.config import ParallelConfig, Recipe
from phi4.config.fp8_rules import fp8_layers
from phi4.config.te_rules import without_transformer_engine
from phi4.engine.layout import Layout, create_layout, destroy_layout
from phi4.engine.model.gpt import Phi4Model, build_chunks, seed_random_states, transformer_config
from phi4.engine.patches import Patches

_LINEARS = (ColumnParallelLinear, RowParallelLinear)


@dataclass(frozen=True)
class ChunkShape:
    """Parameters of one model chunk of one rank."""

    num_layers: int
    num_fp8_layers: int
    """The part of them whose linears run in FP8, ours or Transformer Engine's."""
    num_fp8_parameters: int
    """Weights of these linears."""
    num_parameters: int
    num_counted_parameters: int
    """Without duplicates on other tensor ranks: norm weights count on rank 0 only."""
    is_first: bool
    """Whether it has the embedding."""
    is_last: bool
    """Whether it has the final norm and the loss head."""


@dataclass(frozen=True)
class RankShape:
    """Parameters of one pipeline and tensor rank."""

    pp_rank: int
    tp_rank: int
    chunks: tuple[ChunkShape, ...]

    @property
    def num_parameters(self) -> int:
        """Parameters in this rank's memory."""
        return sum(chunk.num_parameters for chunk in self.chunks)

    @property
    def num_counted_parameters(self) -> int:
        """This rank's part of a sum over all ranks that counts every parameter once."""
        return sum(chunk.num_counted_parameters for chunk in self.chunks)


def rank_shapes(recipe: Recipe) -> list[RankShape]:
    """Build every pipeline and tensor rank of one model copy on the meta device and count its
    parameters.

    Transformer Engine is not used: its linears have the same parameters as megatron-core's.

    Args:
        recipe: checked against the rules.
    """
    parallel = recipe.parallel
    per_stage = parallel.tensor * parallel.context
    return [
        _shape_of(recipe, rank=pp_rank * per_stage + tp_rank)
        for pp_rank in range(parallel.pipeline)
        for tp_rank in range(parallel.tensor)
    ]


@contextmanager
def fake_rank(
    parallel: ParallelConfig, rank: int, kind: Literal["meta", "cpu"] = "meta"
) -> Iterator[Layout]:
    """Act as one rank of one model copy; collectives return at once and move no data.

    Args:
        parallel: degrees; data parallelism is ignored.
        rank: in [0, tensor x context x pipeline).
        kind: meta for shapes, cpu to run layers whose values do not matter.
    """
    dist.init_process_group(
        "fake", store=FakeStore(), rank=rank, world_size=parallel.model_parallel_size
    )
    try:
        with Patches(kind):
            yield create_layout(parallel)
    finally:
        destroy_layout()
        dist.destroy_process_group()


def _shape_of(recipe: Recipe, rank: int) -> RankShape:
    with fake_rank(recipe.parallel, rank) as layout, warnings.catch_warnings():
        # megatron-core's advice concerns transformer-engine's attention, which is not used.
        warnings.simplefilter("ignore", UserWarning)
        seed_random_states(recipe.run.seed)
        built = without_transformer_engine(recipe)
        config = transformer_config(built, frees_stage_outputs=True)
        chunks = build_chunks(built, layout, config)
        shapes = tuple(_count(chunk, layout.tp_rank, fp8_layers(recipe)) for chunk in chunks)
        return RankShape(layout.pp_rank, layout.tp_rank, shapes)


def _count(chunk: Phi4Model, tp_rank: int, in_fp8: range) -> ChunkShape:
    """Count a chunk's parameters.

    Args:
        chunk: on the meta device.
        tp_rank: of this rank.
        in_fp8: global indices of the layers whose linears run in FP8.
    """
    sizes = [
        (parameter.numel(), tp_rank == 0 or _is_split(parameter))
        for parameter in chunk.parameters()
    ]
    fp8_sizes = [
        [one.weight.numel() for one in layer.modules() if isinstance(one, _LINEARS)]
        for layer in chunk.decoder.layers
        if layer.layer_number - 1 in in_fp8
    ]
    return ChunkShape(
        num_layers=len(chunk.decoder.layers),
        num_fp8_layers=len(fp8_sizes),
        num_fp8_parameters=sum(map(sum, fp8_sizes)),
        num_parameters=sum(size for size, _ in sizes),
        num_counted_parameters=sum(size for size, counts in sizes if counts),
        is_first=chunk.pre_process,
        is_last=chunk.post_process,
    )


def _is_split(parameter: torch.nn.Parameter) -> bool:
    return getattr(parameter, "tensor_model_parallel", False)
