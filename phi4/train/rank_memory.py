"""This rank's memory: what is kept from step to step, and the peak of the last step."""

import re
from functools import cached_property
from pathlib import Path

import psutil
import torch

from phi4.engine.engine import Engine
from phi4.engine.memory_use import KeptBytes, kept_bytes


class RankMemory:
    """Bytes by kind.

    Args:
        engine: its tensors are counted.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._process = psutil.Process()

    @cached_property
    def _kept(self) -> KeptBytes:
        """Counted once, after the first step, which allocates the moments."""
        return kept_bytes(self._engine)

    def numbers(self) -> dict[str, float]:
        """memory/KIND, after a step."""
        kept, device = self._kept, self._engine.platform.device
        numbers = {f"memory/{kind}": size for kind, size in kept._asdict().items()}
        if self._engine.platform.kind == "cpu":
            resident = self._process.memory_info().rss
            return numbers | {"memory/resident": resident, "memory/peak_resident": _peak_resident()}
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        rest = peak - sum(kept)
        return numbers | {"memory/peak": peak, "memory/activations_and_rest": rest}


def _peak_resident() -> int:
    """Peak resident bytes of this process; getrusage would include its parent's before the fork."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    found = re.search(r"^VmHWM:\s+(\d+) kB", status, re.MULTILINE)
    assert found is not None, "Linux 2.6.15 and later write this line"
    return int(found[1]) * 1024
