"""Copy rate and matrix product rate of this device, measured in the same run as the kernels."""

from dataclasses import dataclass

import torch

from phi4_kernels.bench.timing import sample_seconds

_COPY_BYTES = 2**31
_MATMUL = 8192
_SAMPLES = 15


@dataclass(frozen=True, slots=True)
class Ceilings:
    """Rates that no kernel of this run is expected to exceed."""

    bytes_per_second: float
    """Device-to-device copy, bytes read plus bytes written."""
    flops_per_second: float
    """Dense bf16 matrix product on random data (zeros run faster)."""
    l2_bytes: int = 0
    """Size of the L2 cache."""


NOMINAL = Ceilings(4.3e12, 790e12)
"""An H200 as measured elsewhere: for floors on a machine without a GPU."""


def measure() -> Ceilings:
    """Measure both on the current CUDA device."""
    # Random bytes, and random factors below: zeros draw less power, so the clock rises.
    source = torch.randint(256, (_COPY_BYTES,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    a, b = (torch.randn(_MATMUL, _MATMUL, device="cuda").bfloat16() for _ in range(2))
    copy = sample_seconds({"copy": lambda: target.copy_(source)}, _SAMPLES)["copy"]
    matmul = sample_seconds({"matmul": lambda: a @ b}, _SAMPLES)["matmul"]
    median = _SAMPLES // 2
    return Ceilings(
        # Each byte is read once and written once; a product of n^3 is n^3 multiplications and
        # additions.
        2 * _COPY_BYTES / sorted(copy)[median],
        2 * _MATMUL**3 / sorted(matmul)[median],
        torch.cuda.get_device_properties(0).L2_cache_size,
    )
