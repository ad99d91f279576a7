"""apex's FusedAdam."""

from typing import Any

from phi4_kernels.adamw.cases import with_fused_adam
from phi4_kernels.registry import Entry


def _step(entry: Entry) -> Any:
    from apex.optimizers import FusedAdam

    return with_fused_adam(FusedAdam)


FUNCTIONS = {"optimizer_step": _step}
