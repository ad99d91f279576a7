"""Check whether a device supports FP8 products in torch."""

import torch

from phi4.config import PrecisionConfig
from phi4.errors import PlatformError

_LEAST_CAPABILITY = (8, 9)


def check_device(precision: PrecisionConfig, device: torch.device) -> None:
    """Raise an error for FP8 through torch that would fail in the first step or be ten times
    slower.

    Raises:
        PlatformError: the GPU has no FP8, or its product does not support the recipe.
    """
    if device.type != "cuda":
        return
    fault = gpu_fault(precision, torch.cuda.get_device_capability(device))
    if fault:
        raise PlatformError(fault)


def gpu_fault(precision: PrecisionConfig, capability: tuple[int, int]) -> str | None:
    """Return why a GPU of this compute capability does not support FP8 through torch, in one line,
    or None."""
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
            "precision.fp8=torch supports blockwise scaling on a CPU only, as a reference; on a "
            "GPU use precision.fp8_recipe=tensorwise or rowwise"
        )
    if recipe == "rowwise" and precision.dtype == "fp32":
        return (
            "precision.fp8_recipe=rowwise returns bf16 on a GPU, but precision.dtype=fp32; use "
            "precision.dtype=bf16, or precision.fp8_recipe=tensorwise"
        )
    return None
