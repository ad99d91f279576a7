"""Hashes of weights to compare two models tensor by tensor, in any layout."""

import hashlib
from collections.abc import Iterable

import torch
import torch.distributed as dist


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
