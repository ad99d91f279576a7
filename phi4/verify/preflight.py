"""Check the machines of a run before it starts, by comparing every rank with its peers.

Measurements are not compared with a table of expected GPU performance. Ranks of a run do the same
work, so a rank that differs from most, or reaches less than half of the median, would slow down or
end the run on any hardware.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

import msgspec
import psutil
import torch.distributed as dist

from phi4.config import Recipe
from phi4.engine.platform import Platform
from phi4.model.shape import num_parameters
from phi4.train.reliability.same_start import Program, differences, program_of
from phi4.verify.preflight_facts import Device, device_facts, free_disk_bytes
from phi4.verify.preflight_shared import shared_directory_trouble
from phi4.verify.preflight_speed import (
    all_reduce_gbytes_per_second,
    link_gbytes_per_second,
    matmul_tflops,
)

_SLOW = 0.5
"""Fraction of the median below which a rank is reported."""
_OCCUPIED = 0.9
"""Fraction of a GPU's memory that must be free: less means that another process uses it."""
_SAVED_BYTES_PER_PARAMETER = 14
"""bf16 weights, and fp32 master weights and two moments."""


class Facts(msgspec.Struct, frozen=True):
    """All facts and measurements of one rank.

    Attributes:
        program: code, packages and recipe.
        device: the rank's GPU or CPU.
        free_memory_bytes: free memory of the host.
        free_disk_bytes: free space in run.dir.
        shared: problem of the shared directory; empty if there is none.
        matmul_tflops: matrix product throughput of the device.
        link_gbytes_per_second: bandwidth to the better neighbour; 0 without one.
    """

    program: Program
    device: Device
    free_memory_bytes: int
    free_disk_bytes: int
    shared: str
    matmul_tflops: float
    link_gbytes_per_second: float

    @property
    def where(self) -> str:
        return f"rank {self.program.rank} on {self.program.host}"


class Preflight(msgspec.Struct, frozen=True):
    """Result of the preflight over all ranks.

    Attributes:
        facts: facts by rank.
        all_reduce_gbytes_per_second: bus bandwidth over all ranks; 0 for one.
        failures: one line per problem.
    """

    facts: list[Facts]
    all_reduce_gbytes_per_second: float
    failures: list[str]


def preflight(recipe: Recipe, platform: Platform, tick: Callable[[], None]) -> Preflight:
    """Examine this rank's machine, and compare with the others.

    Args:
        recipe: the run.
        platform: this process.
        tick: called between the parts.

    Collectives: those of the speeds; broadcasts of the directory's name; one all-gather of what
    every rank found.
    """
    run_dir = Path(recipe.run.dir)
    shared = shared_directory_trouble(platform, run_dir)
    tick()
    device = device_facts(platform)
    tick()
    alone = platform.world_size == 1
    own = Facts(
        program=program_of(platform.rank, recipe),
        device=device,
        free_memory_bytes=psutil.virtual_memory().available,
        free_disk_bytes=free_disk_bytes(run_dir),
        shared=shared,
        matmul_tflops=matmul_tflops(platform),
        link_gbytes_per_second=0.0 if alone else link_gbytes_per_second(platform),
    )
    tick()
    bandwidth = 0.0 if alone else all_reduce_gbytes_per_second(platform)
    everyone: list[Facts] = [own] * platform.world_size
    if not alone:
        dist.all_gather_object(everyone, own)
    needed = _SAVED_BYTES_PER_PARAMETER * num_parameters(recipe.model)
    return Preflight(everyone, bandwidth, failures(everyone, needed))


def failures(everyone: Sequence[Facts], needed_disk_bytes: int) -> list[str]:
    """Return one line per problem, with rank and host.

    Args:
        everyone: facts of all ranks.
        needed_disk_bytes: space for one checkpoint with the optimizer's state.
    """
    lines = differences([facts.program for facts in everyone])
    lines += [f"{facts.where}: {facts.shared}" for facts in everyone if facts.shared]
    lines += [f"{f.where}: {f.device.trouble}" for f in everyone if f.device.trouble]
    for what in ("name", "driver", "max_clock_mhz"):
        lines += _unlike_most(everyone, what)
    for facts in everyone:
        device = facts.device
        if device.driver and device.free_bytes < _OCCUPIED * device.total_bytes:
            gib = f"{device.free_bytes / 2**30:.0f} of {device.total_bytes / 2**30:.0f} GiB"
            lines.append(f"{facts.where}: {gib} of device memory are free; another process uses it")
        if facts.free_disk_bytes < needed_disk_bytes:
            lines.append(
                f"{facts.where}: {facts.free_disk_bytes / 1e9:.1f} GB free for run.dir, but one "
                f"checkpoint needs {needed_disk_bytes / 1e9:.1f} GB"
            )
    for name, unit, get in _COMPARED:
        lines += _below_peers(everyone, name, unit, get)
    return lines


_COMPARED: tuple[tuple[str, str, Callable[[Facts], float]], ...] = (
    ("matrix products", "TFLOP/s", lambda facts: facts.matmul_tflops),
    ("bandwidth to its neighbours", "GB/s", lambda facts: facts.link_gbytes_per_second),
    ("free host memory", "GiB", lambda facts: facts.free_memory_bytes / 2**30),
)


def _unlike_most(everyone: Sequence[Facts], what: str) -> list[str]:
    values = Counter(getattr(facts.device, what) for facts in everyone)
    (most, _), *_ = values.most_common(1)
    return [
        f"{facts.where}: device {what.replace('_', ' ')} is {value}, but {most} on most ranks"
        for facts in everyone
        if (value := getattr(facts.device, what)) != most
    ]


def _below_peers(
    everyone: Sequence[Facts], name: str, unit: str, get: Callable[[Facts], float]
) -> list[str]:
    middle = median(map(get, everyone))
    return [
        f"{facts.where}: {name} {get(facts):.2f} {unit}, below half of the median {middle:.2f}"
        for facts in everyone
        if get(facts) < _SLOW * middle
    ]
