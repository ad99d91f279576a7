"""Which devices torch multiplies FP8 on."""

import torch

from phi4.config import PrecisionConfig
from phi4.errors import PlatformError

_LEAST_CAPABILITY = (8, 9)


def check_device(precision: PrecisionConfig, device: torch.device) -> None:
    """Refuse FP8 through torch where it would fail in the first step, or take ten times as long.

    Raises:
        PlatformError: the GPU has no FP8, or its product does not serve the recipe.
    """
    if device.type != "cuda":
        return
    fault = gpu_fault(precision, torch.cuda.get_device_capability(device))
    if fault:
        raise PlatformError(fault)


def gpu_fault(precision: PrecisionConfig, capability: tuple[int, int]) -> str | None:
    """Why a GPU of this compute capability cannot serve FP8 through torch, in one line, or None."""
    if precision.fp8 != "torch":
        return None
    recipe = precision.fp8_recipe
    if capability < _LEAST_CAPABILITY:
        found, least = (".".join(map(str, one)) for one in (capability, _LEAST_CAPABILITY))
        return (
            f"precision.fp8=torch on a GPU of compute capability {found}: FP8 needs {least}; "
            "use precision.fp8=off"
        )
    if recipe == "blockwise":
        return (
            "precision.fp8=torch multiplies blocks on a CPU only, where it is the definition to "
            "compare with; on a GPU use precision.fp8_recipe=tensorwise or rowwise"
        )
    if recipe == "rowwise" and precision.dtype == "fp32":
        return (
            "precision.fp8_recipe=rowwise gives bf16 on a GPU, and precision.dtype=fp32; use "
            "precision.dtype=bf16, or precision.fp8_recipe=tensorwise"
        )
    return None
