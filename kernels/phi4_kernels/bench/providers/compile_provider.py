"""The definition of an op through torch.compile."""

from collections.abc import Callable
from typing import Any

import torch

from phi4_kernels.registry import Entry
from phi4_kernels.testing import gates


def _compiled(entry: Entry) -> Callable[..., Any]:
    return torch.compile(entry.reference, fullgraph=True, dynamic=False)


FUNCTIONS = dict.fromkeys(gates.entries(), _compiled)
