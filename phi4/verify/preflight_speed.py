"""Measure matrix product throughput of this rank's device and bandwidth of its links, in
seconds."""

import time
from collections.abc import Callable

import torch
import torch.distributed as dist

from phi4.engine.platform import Platform

_REPEATS = 5
_CUDA_SIZE, _CPU_SIZE = 8192, 768
_CUDA_BYTES, _CPU_BYTES = 64 << 20, 4 << 20


def matmul_tflops(platform: Platform) -> float:
    """Return the best TFLOP/s of a few square products, bf16 on CUDA and fp32 on the CPU."""
    is_cuda = platform.kind == "cuda"
    size = _CUDA_SIZE if is_cuda else _CPU_SIZE
    dtype = torch.bfloat16 if is_cuda else torch.float32
    a, b = (torch.randn(size, size, device=platform.device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / _best_seconds(platform, lambda: a @ b) / 1e12


def all_reduce_gbytes_per_second(platform: Platform) -> float:
    """Return the bus bandwidth of an all-reduce over all ranks, GB/s; the same on all.

    Collectives: a few all-reduces over all ranks, of 64 MiB on CUDA and 4 MiB on the CPU.
    """
    data = _payload(platform)
    seconds = _best_seconds(platform, lambda: dist.all_reduce(data))
    share = 2 * (platform.world_size - 1) / platform.world_size
    return share * data.numel() * data.element_size() / seconds / 1e9


def link_gbytes_per_second(platform: Platform) -> float:
    """Return the bandwidth of an exchange with a neighbour, GB/s: the better of its two neighbours.

    A rank next to one with a slow link also has another neighbour, so it is not blamed. With three
    ranks or fewer, and at the end of an odd number, a rank may have only one.

    Collectives: sends and receives between neighbours, as many bytes as `all_reduce`.
    """
    data, best = _payload(platform), 0.0
    taken = torch.empty_like(data)
    for first in (0, 1):
        # Pairs (0, 1), (2, 3), ...; then (1, 2), (3, 4), ... and the last with rank 0.
        peer = _partner(platform.rank, first, platform.world_size)
        if peer is None:
            continue

        def exchange(peer: int = peer) -> None:
            asked = [dist.P2POp(dist.isend, data, peer), dist.P2POp(dist.irecv, taken, peer)]
            for work in dist.batch_isend_irecv(asked):
                work.wait()

        seconds = _best_seconds(platform, exchange)
        best = max(best, data.numel() * data.element_size() / seconds / 1e9)
    return best


def _partner(rank: int, first: int, world_size: int) -> int | None:
    """Return the partner of this rank in a round, or None if it has none."""
    if first and world_size % 2 == 0:
        return (rank + (1 if rank % 2 else -1)) % world_size if world_size > 2 else None
    peer = rank + 1 if (rank - first) % 2 == 0 else rank - 1
    return peer if first <= peer < world_size and rank >= first else None


def _payload(platform: Platform) -> torch.Tensor:
    num_bytes = _CUDA_BYTES if platform.kind == "cuda" else _CPU_BYTES
    return torch.zeros(num_bytes // 4, device=platform.device)


def _best_seconds(platform: Platform, act: Callable[[], object]) -> float:
    """Return the best time of a few repeats; the first one, which may compile or connect, is
    ignored."""
    seconds = []
    for _ in range(1 + _REPEATS):
        begun = time.perf_counter()
        act()
        if platform.kind == "cuda":
            torch.cuda.synchronize(platform.device)
        seconds.append(time.perf_counter() - begun)
    return min(seconds[1:])
