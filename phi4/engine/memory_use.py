"""Count the bytes of the tensors that a rank keeps from step to step, on the tensors themselves.

Storages are counted, not shapes: parameters that are views of one buffer count once, with the
buffer's padding, and fp32 masters that are views of the weights count as weights.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch

from phi4.engine.engine import Engine


class KeptBytes(NamedTuple):
    """Bytes kept on one rank."""

    weights: int
    gradients: int
    optimizer: int
    """Masters and moments; state created in the first step counts only after it."""


def kept_bytes(engine: Engine) -> KeptBytes:
    """Return the bytes of the engine's tensors; without an optimizer the last two are 0."""
    parameters = [p for chunk in engine.bare_chunks for p in chunk.parameters()]
    weights = _storages(parameter.data for parameter in parameters)
    buffers = (getattr(parameter, "main_grad", None) for parameter in parameters)
    gradients = _storages(buffer for buffer in buffers if buffer is not None)
    optimizer = _storages(_optimizer_tensors(engine))
    counted = weights.keys() | gradients.keys()
    own = (size for place, size in optimizer.items() if place not in counted)
    return KeptBytes(sum(weights.values()), sum(gradients.values()), sum(own))


def _optimizer_tensors(engine: Engine) -> Iterator[torch.Tensor]:
    if engine.optimizer is None:
        return
    for optimizer in engine.optimizer.chained_optimizers:
        yield from optimizer.get_parameters()
        for group in [] if optimizer.is_stub_optimizer else optimizer.optimizer.state.values():
            yield from (value for value in group.values() if isinstance(value, torch.Tensor))


def _storages(tensors: Iterable[torch.Tensor]) -> dict[int, int]:
    """Return bytes by address."""
    storages = (tensor.untyped_storage() for tensor in tensors)
    return {storage.data_ptr(): storage.nbytes() for storage in storages}
