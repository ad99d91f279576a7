"""The old name of `quantization`, which megatron-core imports."""

import warnings

from transformer_engine.pytorch.quantization import (
    FP8GlobalStateManager,
    fp8_autocast,
    fp8_model_init,
)

warnings.warn(
    "Using deprecated internal API from Transformer Engine. transformer_engine.pytorch.fp8 will "
    "be removed in a future release.",
    DeprecationWarning,
    stacklevel=2,
)
__all__ = ["FP8GlobalStateManager", "fp8_autocast", "fp8_model_init"]
