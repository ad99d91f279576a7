"""PyTorch as a user gets it without effort: its own kernels, called one by one."""

from collections.abc import Callable
from functools import partial
from typing import Any

from phi4_kernels import registry
from phi4_kernels.bench.providers import documents, losses
from phi4_kernels.registry import Entry


def _eager(entry: Entry) -> Callable[..., Any]:
    return partial(entry.timed or entry.function, implementation="torch")


def _flash_attention(entry: Entry) -> Callable[..., Any]:
    """Ours reads the boundaries from the device, which no graph can capture."""
    from torch.nn.attention import SDPBackend

    return documents.sdpa(SDPBackend.FLASH_ATTENTION)


FUNCTIONS = dict.fromkeys(registry.entries(), _eager) | {
    "attention": _flash_attention,
    "cross_entropy": lambda entry: losses.of_logits(losses.torch_losses),
    "cross_entropy_sharded": lambda entry: losses.with_gradient(losses.torch_losses),
    "linear_cross_entropy": lambda entry: losses.of_hidden(losses.torch_losses),
    "summed_linear_cross_entropy": lambda entry: losses.with_gradients(losses.torch_total),
}
