"""Finds the registered operators that an entry runs, and checks each by torch's opcheck."""

from functools import partial
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from phi4_kernels.registry import Case, Entry
from phi4_kernels.testing import numerics


class _Recorder(TorchDispatchMode):
    """Keeps the arguments of every call of a phi4 operator, as they were before the call."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, tuple[Any, tuple[Any, ...]]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "phi4":
            # Before the call: an operator may overwrite its arguments.
            kept = tuple(arg.clone() if isinstance(arg, torch.Tensor) else arg for arg in args)
            self.calls[func.name()] = (func, kept)
        return func(*args, **(kwargs or {}))


def check(entry: Entry, case: Case, dtype: torch.dtype, device: str = "cpu") -> list[str]:
    """Check schema, fake tensors and tracing of all operators that the entry's case runs.

    Returns:
        Names of the operators.

    Raises:
        torch.testing._internal.optests.generate_tests.OpCheckError: one is wrong.
    """
    inputs = entry.make(case, dtype)
    gradients = numerics.incoming(entry, case, inputs)
    function = partial(entry.function, implementation="triton")
    with _Recorder() as recorder:
        numerics.evaluate(function, inputs, gradients, partial(numerics.copied, device=device))
    for operator, arguments in recorder.calls.values():
        torch.library.opcheck(operator, arguments)
    return list(recorder.calls)
