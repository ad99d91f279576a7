"""Collect facts about one rank's machine, without communication: device, memory, disk."""

import shutil
import subprocess
from pathlib import Path

import msgspec
import psutil
import torch

from phi4.engine.platform import Platform

_QUERY = ("driver_version", "clocks.max.sm", "clocks.sm", "temperature.gpu")
_SMI_SECONDS = 20.0


class Device(msgspec.Struct, frozen=True):
    """The device of one rank.

    Attributes:
        name: device name as reported by the driver; `cpu` without a GPU.
        driver: driver version; empty on the CPU.
        max_clock_mhz: highest clock that the driver allows; 0 where unknown.
        clock_mhz: current clock.
        celsius: temperature.
        free_bytes: free device memory; on the CPU the host's available memory.
        total_bytes: total device memory.
        trouble: why the driver could not be queried; empty if it could.
    """

    name: str
    driver: str = ""
    max_clock_mhz: int = 0
    clock_mhz: int = 0
    celsius: int = 0
    free_bytes: int = 0
    total_bytes: int = 0
    trouble: str = ""


def device_facts(platform: Platform) -> Device:
    """Return the device of this rank, before the run has allocated anything on it."""
    if platform.kind == "cpu":
        memory = psutil.virtual_memory()
        return Device("cpu", free_bytes=memory.available, total_bytes=memory.total)
    properties = torch.cuda.get_device_properties(platform.device)
    free, total = torch.cuda.mem_get_info(platform.device)
    device = Device(properties.name, free_bytes=free, total_bytes=total)
    try:
        # By uuid: nvidia-smi ignores CUDA_VISIBLE_DEVICES.
        answer = subprocess.run(
            [
                "nvidia-smi",
                f"--id=GPU-{properties.uuid}",
                f"--query-gpu={','.join(_QUERY)}",
                "--format=csv,noheader,nounits",
            ],
            capture_output=True,
            text=True,
            timeout=_SMI_SECONDS,
            check=True,
        ).stdout
    except (OSError, subprocess.SubprocessError) as error:
        return msgspec.structs.replace(device, trouble=f"nvidia-smi: {error}")
    return with_answer(device, answer)


def with_answer(device: Device, answer: str) -> Device:
    """Return the device with values from nvidia-smi.

    Args:
        device: the device as reported by torch.
        answer: one line of comma-separated values; a missing value is [N/A].
    """
    values = [value.strip() for value in answer.strip().split(",")]
    if len(values) != len(_QUERY):
        return msgspec.structs.replace(device, trouble=f"nvidia-smi printed {answer.strip()!r}")
    driver, *numbers = values
    max_clock, clock, celsius = (int(n) if n.isdecimal() else 0 for n in numbers)
    return msgspec.structs.replace(
        device, driver=driver, max_clock_mhz=max_clock, clock_mhz=clock, celsius=celsius
    )


def free_disk_bytes(directory: Path) -> int:
    """Return free bytes at a directory that may not exist yet."""
    return shutil.disk_usage(existing_part(directory)).free


def existing_part(directory: Path) -> Path:
    """Return the directory, or its nearest existing parent."""
    whole = directory.absolute()
    return next(path for path in (whole, *whole.parents) if path.is_dir())
