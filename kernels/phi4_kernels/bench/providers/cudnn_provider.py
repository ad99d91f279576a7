"""cuDNN through PyTorch: attention only, so none of the ops here yet."""

from typing import Any

FUNCTIONS: dict[str, Any] = {}
