"""State that Transformer Engine's linears keep between calls of the engine, as tensors.

A linear keeps its weight in FP8 until it is notified of a change. Under delayed scaling it also
keeps, for every matrix that it casts, a scale and the largest magnitudes of earlier micro-batches:
Transformer Engine exports these as a pickle in `_extra_state`, which our checkpoints must not
contain; here they are tensors.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

SCALINGS_KEPT = {"forward": "scaling_fwd", "backward": "scaling_bwd"}
"""Transformer Engine's names: of input, weight and output; of both gradients."""


class TELinearState:
    """A mixin for megatron-core's two parallel linears of Transformer Engine.

    Attributes:
        is_first_microbatch: megatron-core's attribute: the weight is cast in the next forward pass.
        fp8_meta: Transformer Engine's attribute.
    """

    is_first_microbatch: bool
    fp8_meta: dict[str, Any]
    init_fp8_meta_tensors: Callable[[object], None]
    """Transformer Engine's."""

    def get_extra_state(self) -> None:
        """Return None instead of a pickle."""
        return None

    def set_extra_state(self, state: None) -> None:
        """Do nothing: see `delayed_state`."""

    def forget_weight(self) -> None:
        """Invalidate the cached weight; the values that evaluation saw leave no trace in the
        history."""
        self.is_first_microbatch = True
        for _, scaling in self._scalings():
            # The row that the next pass fills; training leaves it at zero.
            scaling.amax_history[0].zero_()

    def begin_delayed(self, recipe: object) -> None:
        """Allocate scales and histories now, as the first forward pass would.

        Args:
            recipe: Transformer Engine's recipe, whose context is entered.
        """
        self.fp8_meta.update(num_gemms=1, recipe=recipe)
        self.init_fp8_meta_tensors(recipe)

    def delayed_state(self) -> dict[str, torch.Tensor]:
        """Return by direction: [1 + history, matrices], fp32; the scales, then the largest
        magnitudes.

        Empty without delayed scaling.
        """
        return {
            direction: torch.cat([scaling.scale[None], scaling.amax_history])
            for direction, scaling in self._scalings()
        }

    @torch.no_grad()
    def set_delayed_state(self, state: dict[str, torch.Tensor]) -> None:
        """Set the result of `delayed_state`, in place: Transformer Engine holds these tensors."""
        for direction, scaling in self._scalings():
            scaling.scale.copy_(state[direction][0])
            scaling.amax_history.copy_(state[direction][1:])

    def _scalings(self) -> Iterator[tuple[str, Any]]:
        for direction, name in SCALINGS_KEPT.items():
            scaling = self.fp8_meta.get(name)
            if hasattr(scaling, "amax_history"):
                yield direction, scaling


def te_linears(chunks: Sequence[torch.nn.Module]) -> Iterator[tuple[str, TELinearState]]:
    """Yield (name, linear) of model chunks, with global layer numbers."""
    for chunk in chunks:
        for layer in chunk.decoder.layers:  # type: ignore[union-attr]  # torch: Tensor | Module
            for name, module in layer.named_modules():
                if isinstance(module, TELinearState):
                    yield f"layers.{layer.layer_number - 1}.{name}", module


def delayed_states(chunks: Sequence[torch.nn.Module]) -> dict[str, torch.Tensor]:
    """Return `TELinearState.delayed_state` by name of a linear and direction."""
    return {
        f"{name}.{direction}": tensor
        for name, linear in te_linears(chunks)
        for direction, tensor in linear.delayed_state().items()
    }


def set_delayed_states(
    chunks: Sequence[torch.nn.Module], states: Mapping[str, torch.Tensor]
) -> None:
    """Set the result of `delayed_states`."""
    for name, linear in te_linears(chunks):
        names = {direction: f"{name}.{direction}" for direction in SCALINGS_KEPT}
        linear.set_delayed_state({key: states[one] for key, one in names.items() if one in states})
