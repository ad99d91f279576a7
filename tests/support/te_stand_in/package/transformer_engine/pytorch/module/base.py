"""What modules have in common."""

import pickle
from typing import Any

import torch

from transformer_engine.common.recipe import Recipe
from transformer_engine.interface import checked
from transformer_engine.pytorch.quantization import (
    DelayedScalingRecipeState,
    FP8GlobalStateManager,
)


@checked("get_dummy_wgrad")
def get_dummy_wgrad(shape: list[int], dtype: torch.dtype, zero: bool = False) -> torch.Tensor:
    """A gradient that nobody reads."""
    return torch.full(tuple(shape), 0.0 if zero else torch.nan, dtype=dtype)


class TransformerEngineBaseModule(torch.nn.Module):
    """The state of FP8 of a module."""

    def __init__(self) -> None:
        super().__init__()
        self.fp8 = False
        self.fp8_meta: dict[str, Any] = {}
        self.is_registered = False

    @checked("TransformerEngineBaseModule.init_fp8_meta_tensors")
    def init_fp8_meta_tensors(self, recipe: Recipe) -> None:
        """Allocate scales and histories, where there are none yet."""
        if recipe.delayed() and "scaling_fwd" not in self.fp8_meta:
            device = self.weight.device
            for mode, name in (("forward", "scaling_fwd"), ("backward", "scaling_bwd")):
                self.fp8_meta[name] = DelayedScalingRecipeState(recipe, mode=mode, device=device)

    @checked("TransformerEngineBaseModule.get_extra_state")
    def get_extra_state(self) -> torch.Tensor:
        """A pickle."""
        return torch.frombuffer(bytearray(pickle.dumps(self.fp8_meta)), dtype=torch.uint8)

    @checked("TransformerEngineBaseModule.set_extra_state")
    def set_extra_state(self, state: torch.Tensor) -> None:
        """Runs what the pickle asks for."""
        self.fp8_meta.update(pickle.loads(state.numpy().tobytes()))

    def enter(self) -> None:
        """What a forward pass finds of its context."""
        manager = FP8GlobalStateManager
        self.fp8 = manager.FP8_ENABLED
        if not self.fp8:
            return
        recipe = self.fp8_meta["recipe"] = manager.FP8_RECIPE
        self.fp8_meta["num_gemms"] = 1
        self.init_fp8_meta_tensors(recipe)
        if recipe.delayed() and not self.is_registered:
            self.is_registered = True
            for at, name in enumerate(("scaling_fwd", "scaling_bwd")):
                manager.histories[at].append(self.fp8_meta[name])
                manager.group_of[id(self.fp8_meta[name])] = manager.FP8_DISTRIBUTED_GROUP
