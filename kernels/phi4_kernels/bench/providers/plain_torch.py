"""Plain PyTorch: its own kernels, or the definition through torch.compile."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from phi4_kernels.errors import UnavailableError
from phi4_kernels.registry import Entry


def eager(entry: Entry) -> Callable[..., Any]:
    """The op's implementation `torch`."""
    return partial(entry.timed or entry.function, implementation="torch")


def compiled(entry: Entry) -> Callable[..., Any]:
    """The definition of the op through torch.compile.

    Raises:
        UnavailableError: the definition takes too much memory.
    """
    if entry.op == "attention":
        raise UnavailableError(
            f"compile has no {entry.name}: the definition holds all scores, 43 GB in fp32 for 40 "
            "heads of 16,384 tokens; expected a provider that does not; drop it"
        )
    # The definition, not our `torch` implementation: code that a user would compile.
    return torch.compile(entry.reference, fullgraph=True, dynamic=False)
