"""The one place where the implementation of each op is chosen.

A choice is made at start, with its reason, and logged; nothing falls back later.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from phi4_kernels import dispatch, registry
from phi4_kernels.attention.arguments import HEAD_DIMS
from phi4_kernels.dispatch import Choice
from phi4_kernels.errors import KernelError

from phi4.config import KernelsConfig
from phi4.errors import ConfigError


def choose(
    kernels: KernelsConfig, device: torch.device, head_dim: int = HEAD_DIMS[0]
) -> tuple[Choice, ...]:
    """The implementation of every op on a device, for attention heads of this width.

    Raises:
        ConfigError: an implementation was named that does not exist or cannot run here.
    """
    choices = (_choose(op, asked, device) for op, asked in kernels.model_dump().items())
    return tuple(_for_heads(choice, kernels, head_dim) for choice in choices)


def _choose(op: str, asked: str, device: torch.device) -> Choice:
    try:
        return dispatch.choose(op, asked, device)
    except KernelError as error:
        raise ConfigError(f"kernels.{op}={asked}: {error}") from error


def _for_heads(choice: Choice, kernels: KernelsConfig, head_dim: int) -> Choice:
    """The choice, if attention's kernels take heads of this width; torch takes any."""
    named = choice.implementation
    if choice.op != "attention" or named == "torch" or head_dim in HEAD_DIMS:
        return choice
    widths = f"{named} takes head dims {', '.join(map(str, HEAD_DIMS))}, the model's is {head_dim}"
    if kernels.attention != "auto":
        raise ConfigError(f"kernels.attention={named}: {widths}; use auto or torch")
    return replace(choice, implementation="torch", reason=f"auto: {widths}")


def implementation_of(op: str, choices: Sequence[Choice]) -> str:
    """The chosen implementation of an op; torch where nothing was chosen."""
    return next((choice.implementation for choice in choices if choice.op == op), "torch")


def decoding_implementation(attention: str) -> str:
    """What attends to a cache's blocks under the chosen implementation of attention.

    Gluon has no such form; Triton, which runs wherever Gluon does, has.
    """
    return attention if registry.provides("attention", attention, "decode") else "triton"
