"""Contexts, and the scales and histories of delayed scaling."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from transformer_engine.common.recipe import DelayedScaling, Format, Recipe
from transformer_engine.interface import VERSION, checked

_MATRICES = {"forward": 3, "backward": 2}


class FP8GlobalStateManager:
    """What holds inside a context, and every linear's histories."""

    FP8_ENABLED = False
    FP8_RECIPE: Recipe | None = None
    FP8_DISTRIBUTED_GROUP: Any = None
    IS_FIRST_FP8_MODULE = False
    AUTOCAST_DEPTH = 0
    histories: tuple[list["DelayedScalingRecipeState"], ...] = ([], [])
    """Forward, backward."""
    group_of: dict[int, Any] = {}  # noqa: RUF012, Transformer Engine keeps it on the class too

    @classmethod
    @checked("FP8GlobalStateManager.is_fp8_enabled")
    def is_fp8_enabled(cls) -> bool:
        return cls.FP8_ENABLED

    @classmethod
    @checked("FP8GlobalStateManager.is_fp8_available")
    def is_fp8_available(cls) -> tuple[bool, str]:
        return True, ""

    @classmethod
    @checked("FP8GlobalStateManager.is_fp8_block_scaling_available")
    def is_fp8_block_scaling_available(cls) -> tuple[bool, str]:
        return True, ""

    @classmethod
    @checked("FP8GlobalStateManager.reset")
    def reset(cls) -> None:
        """Forget every linear."""
        cls.histories, cls.group_of = ([], []), {}

    @classmethod
    @checked("FP8GlobalStateManager.reduce_and_update_fp8_tensors")
    def reduce_and_update_fp8_tensors(cls, forward: bool = True) -> None:
        """Agree on the largest values of this pass, and set every scale from the history."""
        for state in cls.histories[0 if forward else 1]:
            group = cls.group_of[id(state)]
            if group is not None and group.size() > 1:
                dist.all_reduce(state.amax_history[0], dist.ReduceOp.MAX, group=group)
            state.next_scale()


class DelayedScalingRecipeState:
    """Scales and histories of one direction of a linear."""

    def __init__(self, recipe: DelayedScaling, *, mode: str, device: torch.device) -> None:
        count = _MATRICES[mode]
        self.recipe, self.mode = recipe, mode
        self.dtype = dtype_of(recipe, is_value=mode == "forward")
        self.scale = torch.ones(count, device=device)
        self.amax_history = torch.zeros(recipe.amax_history_len, count, device=device)

    def next_scale(self) -> None:
        amax = self.amax_history.amax(dim=0)
        largest = torch.finfo(self.dtype).max
        known = (amax > 0) & amax.isfinite()
        self.scale.copy_(torch.where(known, largest / amax, self.scale))
        self.amax_history.copy_(self.amax_history.roll(-1, 0))
        self.amax_history[0] = 0


def dtype_of(recipe: Recipe, *, is_value: bool) -> torch.dtype:
    """Of weights and activations, or of gradients."""
    if recipe.fp8_format == Format.E4M3 or is_value:
        return torch.float8_e4m3fn
    return torch.float8_e5m2


@contextmanager
def _autocast(enabled: bool, recipe: Recipe | None, group: Any) -> Iterator[None]:
    state = FP8GlobalStateManager
    names = ("FP8_ENABLED", "FP8_RECIPE", "FP8_DISTRIBUTED_GROUP", "IS_FIRST_FP8_MODULE")
    before = {name: getattr(state, name) for name in names}
    state.FP8_ENABLED, state.FP8_RECIPE, state.FP8_DISTRIBUTED_GROUP = enabled, recipe, group
    state.IS_FIRST_FP8_MODULE |= state.AUTOCAST_DEPTH == 0
    state.AUTOCAST_DEPTH += 1
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(state, name, value)
        state.AUTOCAST_DEPTH -= 1
        if enabled and state.AUTOCAST_DEPTH == 0 and torch.is_grad_enabled():
            state.reduce_and_update_fp8_tensors(forward=True)


@checked("fp8_autocast")
def fp8_autocast(
    enabled: bool = True,
    calibrating: bool = False,
    fp8_recipe: Recipe | None = None,
    fp8_group: Any = None,
    _graph: bool = False,
) -> Any:
    """The context in which linears multiply in FP8."""
    warnings.warn(
        "fp8_autocast is deprecated and will be removed", DeprecationWarning, stacklevel=2
    )
    if calibrating or _graph:
        raise NotImplementedError("calibrating and _graph are no part of the stand-in")
    return _autocast(enabled, fp8_recipe, fp8_group)


@checked("fp8_model_init")
def fp8_model_init(*args: Any, **kwargs: Any) -> Any:
    """The context in which weights are built in FP8."""
    raise NotImplementedError("weights in FP8 are no part of the stand-in")


__all__ = ["VERSION", "FP8GlobalStateManager", "fp8_autocast", "fp8_model_init"]
