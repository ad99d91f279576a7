"""Weights as full tensors by global name, the same in any layout: given, read and hashed."""

import hashlib
from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist

from phi4.engine.layout import Layout
from phi4.engine.model.gpt import Phi4Model, global_parameters
from phi4.engine.model.tensor_parts import shard, unshard


def whole_parameters(chunks: list[Phi4Model], layout: Layout) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (global name, full tensor) of this pipeline stage, the same on every tensor rank.

    Collectives: one all-gather over tp per split tensor.
    """
    for name, parameter in global_parameters(chunks):
        yield name, unshard(parameter.detach(), parameter, layout)


@torch.no_grad()
def read_parameters(
    stream: Iterable[tuple[str, torch.Tensor]], chunks: list[Phi4Model], layout: Layout
) -> None:
    """Load this stage's parameters from a stream of full tensors, none of which is kept.

    Args:
        stream: (global name, full tensor), in any order; those of other stages are skipped.
        chunks: this pipeline rank's model chunks.
        layout: the rank grid.

    Raises:
        KeyError: the stream lacks parameters of this stage.
    """
    waiting = dict(global_parameters(chunks))
    for name, tensor in stream:
        parameter = waiting.pop(name, None)
        if parameter is not None:
            parameter.copy_(shard(tensor, parameter, layout))
    if waiting:
        raise KeyError(f"no weights for {', '.join(sorted(waiting))}")


def tensor_sha256(tensor: torch.Tensor) -> str:
    """Return the sha256 of a tensor's bytes in row-major order."""
    # numpy has no bfloat16, so the bytes are viewed as integers.
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(flat.numpy().data).hexdigest()


def weights_sha256(
    stage: Iterable[tuple[str, torch.Tensor]], pipeline_group: dist.ProcessGroup
) -> dict[str, str]:
    """Return the sha256 of every full tensor of a model by global name, sorted, the same on every
    rank.

    Args:
        stage: (global name, full tensor) of this pipeline stage.
        pipeline_group: ranks that hold the other stages.

    Collectives: one all-gather of names and hashes over pp, about 100 bytes per tensor.
    """
    own = {name: tensor_sha256(tensor) for name, tensor in stage}
    stages = [own]
    if pipeline_group.size() > 1:
        stages = [own] * pipeline_group.size()
        dist.all_gather_object(stages, own, group=pipeline_group)
    return dict(sorted(item for hashes in stages for item in hashes.items()))
