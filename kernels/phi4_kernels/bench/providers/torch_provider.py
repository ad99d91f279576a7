"""PyTorch as a user gets it without effort: its own kernels, called one by one."""

from collections.abc import Callable
from functools import partial
from typing import Any

from phi4_kernels.registry import Entry
from phi4_kernels.testing import gates


def _eager(entry: Entry) -> Callable[..., Any]:
    return partial(entry.timed or entry.function, implementation="torch")


FUNCTIONS = dict.fromkeys(gates.entries(), _eager)
