"""FP8 through Transformer Engine: availability checks, and megatron-core's settings for it.

Its linears replace megatron-core's; megatron-core's block of layers enters Transformer Engine's
context around them. Weights stay bf16, and are cast once per step.
"""

from collections.abc import Sequence

import torch
from megatron.core.fp8_utils import get_fp8_context, get_fp8_recipe
from megatron.core.transformer import TransformerConfig
from phi4_kernels.dispatch import Choice

from phi4.config import PrecisionConfig
from phi4.engine.model.fp8.te_state import te_linears
from phi4.engine.model.layers import Linears
from phi4.engine.platform import Platform
from phi4.engine.te_import import SUPPORTED, TRANSFORMER_ENGINE
from phi4.errors import PlatformError

HISTORY_MICRO_BATCHES = 1024
"""For delayed scaling, as in Transformer Engine's default: the scale is derived from the largest
value."""


def check_backend(precision: PrecisionConfig, platform: Platform) -> None:
    """Raise an error for FP8 that this process does not support.

    Raises:
        PlatformError: precision.fp8=te without a GPU that supports it, or without Transformer
            Engine.
    """
    if precision.fp8 != "te":
        return
    instead = "use precision.fp8=torch, or off"
    if platform.kind != "cuda":
        raise PlatformError(
            f"precision.fp8=te needs a GPU, but this run is on the CPU ({platform.reason}); "
            f"{instead}"
        )
    if TRANSFORMER_ENGINE.problem:
        raise PlatformError(
            f"precision.fp8=te needs Transformer Engine {SUPPORTED[0]} to {SUPPORTED[-1]}, but "
            f"{TRANSFORMER_ENGINE.problem}; install the extra te of phi4, or {instead}"
        )
    reason = _why_not_here(precision.fp8_recipe)
    if reason:
        raise PlatformError(
            f"precision.fp8=te with precision.fp8_recipe={precision.fp8_recipe} cannot run here: "
            f"{reason} {instead.capitalize()}"
        )


def _why_not_here(recipe: str) -> str:
    """Return Transformer Engine's own reason, a sentence; empty if it is supported."""
    from transformer_engine.pytorch.quantization import FP8GlobalStateManager as State

    ask = State.is_fp8_block_scaling_available if recipe == "blockwise" else State.is_fp8_available
    fits, reason = ask()
    return "" if fits else reason


def megatron_settings(precision: PrecisionConfig) -> dict[str, object]:
    """Return FP8 settings of megatron-core's TransformerConfig; empty without Transformer
    Engine."""
    if precision.fp8 != "te":
        return {}
    ends = precision.fp8_end_layers_in_bf16
    return {
        "fp8": "e4m3" if precision.fp8_recipe == "blockwise" else "hybrid",
        "fp8_recipe": precision.fp8_recipe,
        "first_last_layers_bf16": ends > 0,
        "num_layers_at_start_in_bf16": ends,
        "num_layers_at_end_in_bf16": ends,
        "fp8_amax_history_len": HISTORY_MICRO_BATCHES,
        "fp8_amax_compute_algo": "max",
    }


def te_layer_linears() -> Linears:
    """Return the linears of a layer that uses FP8."""
    from phi4.engine.model.fp8.te_linear import TEColumnLinear, TERowLinear

    return Linears(TEColumnLinear, TERowLinear)


@torch.no_grad()
def begin_delayed_scaling(chunks: Sequence[torch.nn.Module], config: TransformerConfig) -> None:
    """Give every linear its scales and histories, so that a checkpoint always contains all of
    them."""
    if config.fp8 is None or config.fp8_recipe != "delayed":
        return
    with get_fp8_context(config):
        for _, linear in te_linears(chunks):
            linear.begin_delayed(get_fp8_recipe(config))


def end_delayed_scaling(config: TransformerConfig) -> None:
    """Make Transformer Engine forget the histories that it reduces, before their groups are
    destroyed."""
    if config.fp8 is None:
        return
    from transformer_engine.pytorch.quantization import FP8GlobalStateManager

    FP8GlobalStateManager.reset()


def linear_choice(precision: PrecisionConfig) -> tuple[Choice, ...]:
    """Return the choice of the layers' linears, for the log; None if it is not Transformer
    Engine."""
    if precision.fp8 != "te":
        return ()
    reason = f"precision.fp8=te, precision.fp8_recipe={precision.fp8_recipe}"
    return (Choice("linear", "te", f"{reason}, version {TRANSFORMER_ENGINE.version}"),)
