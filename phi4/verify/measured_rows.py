"""Append measured results to JSON Lines files, with commit, versions and machine load."""

import json
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "megatron-core", "triton", "transformers")


def provenance() -> dict[str, Any]:
    """Return commit (with `-dirty` for a modified checkout), versions, cores and load average."""
    versions = {name: found for name in PACKAGES if (found := _version(name))}
    return {
        "commit": _commit(),
        "versions": {**versions, "python": platform.python_version()},
        "cores": os.cpu_count(),
        "load_average": round(os.getloadavg()[0], 1),
    }


def append_row(path: Path, row: dict[str, Any]) -> None:
    """Append a row to a JSON Lines file; its provenance is added unless the row has its own."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps({**provenance(), **row}) + "\n")


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _commit() -> str:
    git = ("git", "-C", str(Path(__file__).parent))
    try:
        commit = subprocess.check_output(
            [*git, "rev-parse", "--short=12", "HEAD"], text=True, stderr=subprocess.DEVNULL
        ).strip()
        changed = subprocess.check_output(
            [*git, "status", "--porcelain", "--untracked-files=no"], text=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit + ("-dirty" if changed else "")
