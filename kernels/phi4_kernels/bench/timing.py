"""Times kernels on a GPU: CUDA graphs over rotated inputs, variants interleaved launch by launch.

A graph replays all input sets back to back, so the host's gaps are outside the number and no set
is still in L2 when its turn comes again. Variants alternate, so drifting clocks hit all alike.
"""

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

_L2_TURNOVER = 3
_MIN_REPLAY_SECONDS = 1e-3
_WARMUP = 3
_HOST_CALLS = 30


def num_input_sets(bytes_per_set: int) -> int:
    """Input sets that together are several times the L2 cache."""
    l2_bytes = torch.cuda.get_device_properties(0).L2_cache_size
    # ceil(3 * L2 / bytes of a set): when a set's turn comes again, three times the cache has
    # passed.
    return max(2, -(-_L2_TURNOVER * l2_bytes // max(bytes_per_set, 1)))


def sample_seconds(
    variants: Mapping[str, Callable[[], Any]], num_samples: int
) -> dict[str, list[float]]:
    """Event-timed seconds of each call, the variants taking turns."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    names = list(variants)
    for run in variants.values():
        for _ in range(_WARMUP):
            run()
    torch.cuda.synchronize()
    for sample in range(num_samples):
        # The order rotates each round, so that no variant always follows the same one.
        shift = sample % len(names)
        for name in names[shift:] + names[:shift]:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            variants[name]()
            end.record()
            # Awaited one by one: a queue of launches would time the queue.
            end.synchronize()
            times[name].append(start.elapsed_time(end) / 1e3)
    return times


def captured(calls: list[Callable[[], Any]], stream: torch.cuda.Stream) -> Callable[[], Any]:
    """A graph that makes all calls in order."""
    graph = torch.cuda.CUDAGraph()
    # Captured: launches of a replay follow each other without the host.
    with torch.cuda.graph(graph, stream=stream):
        for call in calls:
            call()
    return graph.replay


def repeats(floor_seconds: float, num_calls: int) -> int:
    """Repetitions of the calls in a graph, so that a replay exceeds the clock's resolution."""
    return max(1, int(_MIN_REPLAY_SECONDS / max(floor_seconds * num_calls, 1e-9)))


def host_seconds(call: Callable[[], Any]) -> float:
    """Median host time of a call, without waiting for the launches."""
    times = []
    torch.cuda.synchronize()
    for _ in range(_HOST_CALLS):
        # Not synchronised: the time of the call on the host only.
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    torch.cuda.synchronize()
    return sorted(times)[_HOST_CALLS // 2]


def percentile(times: list[float], percent: int) -> float:
    """The smallest sample that `percent` percent of the samples do not exceed."""
    ordered = sorted(times)
    return ordered[min(len(ordered) - 1, len(ordered) * percent // 100)]
