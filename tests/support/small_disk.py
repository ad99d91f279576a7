"""A disk that a test can fill."""

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def mounted_small_disk(place: Path) -> Iterator[Path]:
    """A file system of 6 MiB in a new directory; mounting it takes root."""
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", place], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", place], check=True)


def ballast(disk: Path, free_bytes: int | None) -> None:
    """Leave so much space free; None leaves all."""
    path = disk / "ballast"
    path.unlink(missing_ok=True)
    if free_bytes is not None:
        path.write_bytes(bytes(shutil.disk_usage(disk).free - free_bytes))
