"""What one rank finds out about its machine without the others: device, memory, disk."""

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
        name: as the driver calls it; `cpu` without one.
        driver: its version; empty on the CPU.
        max_clock_mhz: highest clock that the driver allows; 0 where unknown.
        clock_mhz: at the moment.
        celsius: temperature.
        free_bytes: of its memory; on the CPU what the host has available.
        total_bytes: of its memory.
        trouble: why the driver could not be asked; empty where it could.
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
    """The device of this rank, before anything of the run is on it."""
    if platform.kind == "cpu":
        memory = psutil.virtual_memory()
        return Device("cpu", free_bytes=memory.available, total_bytes=memory.total)
    properties = torch.cuda.get_device_properties(platform.device)
    free, total = torch.cuda.mem_get_info(platform.device)
    device = Device(properties.name, free_bytes=free, total_bytes=total)
    try:
        # By uuid: nvidia-smi does not follow CUDA_VISIBLE_DEVICES.
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
    """What nvidia-smi said of a device.

    Args:
        device: as torch sees it.
        answer: one line of comma-separated values; a value that is not there reads [N/A].
    """
    values = [value.strip() for value in answer.strip().split(",")]
    if len(values) != len(_QUERY):
        return msgspec.structs.replace(device, trouble=f"nvidia-smi said {answer.strip()!r}")
    driver, *numbers = values
    max_clock, clock, celsius = (int(n) if n.isdecimal() else 0 for n in numbers)
    return msgspec.structs.replace(
        device, driver=driver, max_clock_mhz=max_clock, clock_mhz=clock, celsius=celsius
    )


def free_disk_bytes(directory: Path) -> int:
    """Free bytes where a directory is, or will be once it is made."""
    return shutil.disk_usage(existing_part(directory)).free


def existing_part(directory: Path) -> Path:
    """The directory, or the nearest one above it that is there."""
    whole = directory.absolute()
    return next(path for path in (whole, *whole.parents) if path.is_dir())
