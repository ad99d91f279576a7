"""Recompute."""

from collections.abc import Callable
from typing import Any

import torch

from transformer_engine.interface import checked
from transformer_engine.pytorch.not_here import NotHere, not_here
from transformer_engine.pytorch.quantization import FP8GlobalStateManager, fp8_autocast

CudaRNGStatesTracker = NotHere
activation_recompute_forward = get_all_rng_states = not_here


@checked("checkpoint")
def checkpoint(
    function: Callable[..., Any],
    *args: Any,
    distribute_saved_activations: bool = False,
    get_rng_state_tracker: Any = None,
    tp_group: Any = None,
    **others: Any,
) -> Any:
    """Compute a function again in the backward pass, in the context of the forward pass."""
    if distribute_saved_activations or others:
        raise NotImplementedError(f"{others} and distributed activations are no part of it")
    return _Recomputed.apply(function, *args)


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, function: Callable[..., Any], *args: Any) -> Any:
        ctx.function, ctx.args = function, args
        state = FP8GlobalStateManager
        ctx.context = {"enabled": state.FP8_ENABLED, "fp8_recipe": state.FP8_RECIPE}
        with torch.no_grad():
            return function(*args)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        own = [
            arg.detach().requires_grad_(arg.requires_grad) if torch.is_tensor(arg) else arg
            for arg in ctx.args
        ]
        with torch.enable_grad(), fp8_autocast(**ctx.context):
            outputs = ctx.function(*own)
        pairs = [
            (output, grad)
            for output, grad in zip(outputs, grads, strict=True)
            if torch.is_tensor(output) and output.requires_grad
        ]
        torch.autograd.backward(*zip(*pairs, strict=True))
        return None, *(arg.grad if torch.is_tensor(arg) else None for arg in own)
