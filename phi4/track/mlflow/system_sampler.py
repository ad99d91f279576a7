"""Takes samples of this machine during a run: in the follower's process, or in one of its own.

There is one sampler per machine: that of node 0 runs in the follower process, the others in a small
process of their own (`sampling_beside`). A sample that cannot be taken or written is skipped:
sampling neither stops nor slows a run. Sample numbers continue across restarts.
"""

import ctypes
import importlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from phi4.rundir.launched_by import LaunchedBy
from phi4.track.mlflow.system_samples import append_sample, last_sample, samples_path

SAMPLE_SECONDS = 10.0
_NICENESS = 10
_WATCH_SECONDS = 1.0
_PR_SET_PDEATHSIG = 1


class SystemSampler:
    """Samples this machine into its file.

    Args:
        run_dir: run directory of the run.
        node: index of this machine.
        rank_pid: a rank of the run on this machine: processes with the same parent and command line
            are the other ranks.
        nvml: the module pynvml, for tests; imported if installed.
    """

    def __init__(self, run_dir: Path, node: int, rank_pid: int, nvml: Any | None = None) -> None:
        self._run_dir, self._rank_pid = run_dir, rank_pid
        self._path = samples_path(run_dir, node)
        self._sample = last_sample(self._path)
        self._due = 0.0
        self._network: tuple[float, int, int] | None = None
        self._gpus = _Gpus(nvml)
        with suppress(OSError, psutil.Error):
            # The first value covers no interval.
            psutil.cpu_percent()

    def sample_if_due(self) -> None:
        """Take a sample if the last one is SAMPLE_SECONDS old; never raises."""
        now = time.monotonic()
        if now >= self._due:
            self._due = now + SAMPLE_SECONDS
            self.sample()

    def sample(self) -> None:
        """Take a sample; never raises."""
        values: dict[str, float] = {}
        for read in (self._machine, self._ranks, self._disk, self._traffic, self._gpus.read):
            # psutil and NVML raise unpredictable errors on unusual machines.
            with suppress(Exception):
                values |= read()
        line = {"sample": self._sample + 1, "unix_seconds": time.time(), **values}
        with suppress(OSError):
            append_sample(self._path, line)
            self._sample += 1

    def _machine(self) -> dict[str, float]:
        memory = psutil.virtual_memory()
        return {
            "cpu_percent": psutil.cpu_percent(),
            "memory_used_bytes": memory.total - memory.available,
            "memory_total_bytes": memory.total,
        }

    def _ranks(self) -> dict[str, float]:
        rank = psutil.Process(self._rank_pid)
        command, parent = rank.cmdline(), rank.parent()
        total = 0
        for process in parent.children() if parent else [rank]:
            with suppress(psutil.Error):
                if process.pid == rank.pid or process.cmdline() == command:
                    total += process.memory_info().rss
        return {"ranks_resident_bytes": total}

    def _disk(self) -> dict[str, float]:
        return {"run_dir_free_bytes": psutil.disk_usage(str(self._run_dir)).free}

    def _traffic(self) -> dict[str, float]:
        counted = psutil.net_io_counters()
        if counted is None:
            # A machine without any network.
            return {}
        now = (time.monotonic(), counted.bytes_sent, counted.bytes_recv)
        before, self._network = self._network, now
        if before is None or now[0] <= before[0]:
            return {}
        seconds = now[0] - before[0]
        return {
            "network_sent_bytes_per_second": (now[1] - before[1]) / seconds,
            "network_received_bytes_per_second": (now[2] - before[2]) / seconds,
        }


class _Gpus:
    """The GPUs of this machine, by NVML; none if its module, its driver or a GPU is missing."""

    def __init__(self, nvml: Any | None) -> None:
        self._nvml, self._handles = nvml, []
        try:
            nvml = self._nvml = nvml or importlib.import_module("pynvml")
            nvml.nvmlInit()
            self._handles = [
                nvml.nvmlDeviceGetHandleByIndex(i) for i in range(nvml.nvmlDeviceGetCount())
            ]
        except Exception:
            # NVML's errors have a class of its own module, which may be missing.
            self._handles = []

    def read(self) -> dict[str, float]:
        """Read each GPU; values that its driver does not provide are omitted."""
        values: dict[str, float] = {}
        if self._nvml is None:
            return values
        for index, handle in enumerate(self._handles):
            for name, value in _readers(self._nvml, handle).items():
                with suppress(self._nvml.NVMLError):
                    values[f"gpu_{index}_{name}"] = value()
        return values


def _readers(nvml: Any, handle: Any) -> Mapping[str, Callable[[], float]]:
    return {
        "utilization_percent": lambda: nvml.nvmlDeviceGetUtilizationRates(handle).gpu,
        "memory_used_bytes": lambda: nvml.nvmlDeviceGetMemoryInfo(handle).used,
        "power_watts": lambda: nvml.nvmlDeviceGetPowerUsage(handle) / 1000,
        "temperature_celsius": lambda: nvml.nvmlDeviceGetTemperature(
            handle, nvml.NVML_TEMPERATURE_GPU
        ),
    }


@contextmanager
def sampling_beside(run_dir: Path, launched_by: LaunchedBy, *, wanted: bool) -> Iterator[None]:
    """Run a process that samples this machine during the block, if this rank is responsible for it.

    The responsible rank is the first of every machine except node 0. If the process cannot be
    started, the run continues without it.

    Args:
        run_dir: run directory of the run.
        launched_by: launch information of this process.
        wanted: whether the run is tracked.
    """
    process = None
    if wanted and launched_by.node > 0 and launched_by.local_rank == 0:
        words = [str(run_dir.resolve()), str(launched_by.node), str(os.getpid())]
        null = subprocess.DEVNULL
        with suppress(OSError):
            process = subprocess.Popen(
                [sys.executable, "-m", __spec__.name, *words], stdin=null, stdout=null, stderr=null
            )
    try:
        yield
    finally:
        if process is not None:
            process.kill()
            process.wait()


def main(words: Sequence[str]) -> None:
    """Sample until the rank that started this process ends.

    Args:
        words: run directory, node, and the rank's pid.
    """
    run_dir, node, rank_pid = Path(words[0]), int(words[1]), int(words[2])
    # Notices reach every process of a job; the rank decides when this one ends.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    os.nice(_NICENESS)
    sampler = SystemSampler(run_dir, node, rank_pid)
    while os.getppid() == rank_pid:
        sampler.sample_if_due()
        time.sleep(_WATCH_SECONDS)


if __name__ == "__main__":
    main(sys.argv[1:])
