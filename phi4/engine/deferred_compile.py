"""Decorate functions with torch.compile without importing torch's compiler."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch


@contextmanager
def deferred_compile() -> Iterator[None]:
    """Let `torch.compile` as a decorator compile at the function's first call.

    megatron-core decorates some fifty fusions while it is imported. Each rank would thus import
    torch's compiler, which takes as long as importing torch, for functions that our layers replace.
    """
    real = torch.compile
    torch.compile = _on_first_call(real)
    try:
        yield
    finally:
        torch.compile = real


def _on_first_call(compile_now: Callable[..., Any]) -> Callable[..., Any]:
    """Return a decorator without arguments, the form that megatron-core uses."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        compiled: list[Callable[..., Any]] = []

        @wraps(function)
        def call(*args: Any, **named: Any) -> Any:
            if not compiled:
                compiled.append(compile_now(function))
            return compiled[0](*args, **named)

        return call

    return decorate
