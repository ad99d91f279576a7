"""The definition of an op through torch.compile."""

from collections.abc import Callable
from typing import Any

import torch

from phi4_kernels import registry
from phi4_kernels.bench.providers import losses
from phi4_kernels.registry import Entry


def _compiled(entry: Entry) -> Callable[..., Any]:
    return torch.compile(entry.reference, fullgraph=True, dynamic=False)


def _with_gradient(entry: Entry) -> Callable[..., Any]:
    return losses.with_gradient(torch.compile(losses.torch_losses, fullgraph=True, dynamic=False))


def _with_gradients(entry: Entry) -> Callable[..., Any]:
    return losses.with_gradients(torch.compile(losses.torch_total, fullgraph=True, dynamic=False))


# Attention's definition holds all scores: 43 GB in fp32 for 40 heads of 16,384 tokens.
_SMALL = [name for name, entry in registry.entries().items() if entry.op != "attention"]
FUNCTIONS = dict.fromkeys(_SMALL, _compiled) | {
    "cross_entropy_sharded": _with_gradient,
    "summed_linear_cross_entropy": _with_gradients,
}
