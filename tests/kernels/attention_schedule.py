"""How well the programs of dk and dv fill a GPU: their launch, on simulated multiprocessors."""

import heapq
import inspect
from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from typing import Any
from unittest import mock

import torch
from phi4_kernels.attention import Ranges
from phi4_kernels.testing import budgets

_PROCESSORS, _REGISTERS, _WARP = 132, 65_536, 32
"""Multiprocessors of an H200, registers of each, threads of a warp."""
_KERNEL = "attention/d128-up-to-4096/bf16/dkdv_kernel"


def used_share(costs: Sequence[int], num_slots: int) -> float:
    """Share of the slots' time in which they work, of 1.

    Programs start in order, each as soon as a slot is free, as a GPU starts blocks.
    """
    free_at = [0] * num_slots
    for cost in costs:
        heapq.heappush(free_at, heapq.heappop(free_at) + cost)
    return sum(costs) / (num_slots * max(free_at))


class _Recorder:
    """In place of a kernel: keeps the grid and the arguments of a launch by name."""

    def __init__(self, kernel: Any) -> None:
        self._names = list(inspect.signature(kernel.fn).parameters)
        self.grid, self.arguments = (0,), {}

    def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
        def launch(*args: Any, **options: Any) -> None:
            self.grid = grid
            self.arguments = dict(zip(self._names, args, strict=False)) | options

        return launch


def _launch_of(lengths: Sequence[int], num_groups: int, group: int) -> _Recorder:
    """What backward would launch for dk and dv of packed documents, in bf16 with D = 128."""
    # Triton decides at its import whether it interprets.
    from phi4_kernels.attention import triton_dkdv, triton_dq, triton_impl

    dkdv, tokens = _Recorder(triton_dkdv.dkdv_kernel), sum(lengths)
    ends = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    ranges = Ranges.packed(ends, max(lengths))
    heads = (num_groups * group, num_groups)
    q, k = (torch.empty(tokens, n, 128, dtype=torch.bfloat16) for n in heads)
    where = (ranges.q_offsets, ranges.k_starts, ranges.k_ends)
    with (
        mock.patch.object(triton_dkdv, "dkdv_kernel", dkdv),
        mock.patch.object(triton_dkdv, "add_parts"),
        mock.patch.object(triton_dq, "dq_kernel", _Recorder(triton_dq.dq_kernel)),
    ):
        lse = torch.empty(q.shape[:2])
        triton_impl.backward(q, q, k, k, q, lse, *where, max(lengths), max(lengths), True, 1.0, 0)
    return dkdv


def dkdv_schedule(lengths: list[int], num_groups: int, group: int) -> dict[str, float]:
    """Share of an H200 that dk and dv use, and bytes of the sums of parts (0 without parts).

    A program costs the blocks of queries that it multiplies. How many fit a multiprocessor is what
    their registers allow.
    """
    launch = _launch_of(lengths, num_groups, group)
    named, parts = launch.arguments, launch.arguments["num_parts"]
    edges, lows, highs = (named[name].tolist() for name in ("tiles_ptr", "lows_ptr", "highs_ptr"))
    blocks = []
    for start, end in pairwise(edges[1 : 2 + edges[0]]):
        met = [pair for pair in zip(lows[start:end], highs[start:end], strict=True) if pair[1]]
        span = max(high for _, high in met) - min(low for low, _ in met)
        blocks.append(-(-span // named["BLOCK_M"]))
    # As the kernel takes tile, key head and part from its program's number.
    tiles = (program // parts // num_groups for program in range(launch.grid[0]))
    costs = [blocks[tile] * (group // parts) for tile in tiles if tile < len(blocks)]
    budget = budgets.load()[_KERNEL]
    resident = _REGISTERS // (budget["registers"] * budget["num_warps"] * _WARP)
    sums = [named[name] for name in ("dk_ptr", "dv_ptr") if parts > 1]
    return {
        "share": used_share(costs, _PROCESSORS * resident),
        "bytes": sum(x.numel() * x.itemsize for x in sums),
    }
