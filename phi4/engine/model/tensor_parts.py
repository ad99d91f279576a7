"""How a parameter is split over tensor ranks: a rank's part, and the full tensor."""

import torch

from phi4.engine.layout import Layout


def full_shape(parameter: torch.nn.Parameter, tp_size: int) -> tuple[int, ...]:
    """Return the shape of a parameter before it is split over the tensor ranks."""
    shape = list(parameter.shape)
    if getattr(parameter, "tensor_model_parallel", False):
        shape[_partition(parameter)[0]] *= tp_size
    return tuple(shape)


def shard(whole: torch.Tensor, parameter: torch.nn.Parameter, layout: Layout) -> torch.Tensor:
    """Return this tensor rank's part of a full tensor; SwiGLU's [gate | up] is split in each
    half."""
    if not getattr(parameter, "tensor_model_parallel", False):
        return whole
    dim, stride = _partition(parameter)
    pieces = whole.chunk(layout.tp_size * stride, dim=dim)
    return torch.cat(pieces[layout.tp_rank :: layout.tp_size], dim=dim)


def unshard(parameter: torch.Tensor, like: torch.nn.Parameter, layout: Layout) -> torch.Tensor:
    """Return the full tensor from this rank's part; inverse of `shard`, the same on every tensor
    rank.

    Collectives: one all-gather over tp of the parameter's bytes.
    """
    if layout.tp_size == 1 or not getattr(like, "tensor_model_parallel", False):
        return parameter
    parts = [torch.empty_like(parameter) for _ in range(layout.tp_size)]
    torch.distributed.all_gather(parts, parameter.contiguous(), group=layout.groups.tp)
    dim, stride = _partition(like)
    sections = [part.chunk(stride, dim=dim) for part in parts]
    return torch.cat([section[i] for i in range(stride) for section in sections], dim=dim)


def _partition(parameter: torch.nn.Parameter) -> tuple[int, int]:
    """The dimension that megatron-core split, and how many sections of it, each by itself."""
    # Attributes that megatron-core gives a parameter.
    return parameter.partition_dim, parameter.partition_stride  # type: ignore[attr-defined]
