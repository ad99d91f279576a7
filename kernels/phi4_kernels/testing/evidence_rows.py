"""Append-only evidence rows: what was run, on which device, from which commit."""

import json
import os
import subprocess
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import torch

from phi4_kernels import registry


def _output(*command: str) -> str:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, cwd=registry.ROOT, check=True, timeout=30
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


@cache
def machine() -> dict[str, str]:
    """Device, driver, versions, commit: the columns that every row carries.

    PHI4_COMMIT names the commit of a copy without .git, or whose .git has another state.
    """
    import triton

    query = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return {
        "device": torch.cuda.get_device_name(),
        "capability": "{}.{}".format(*torch.cuda.get_device_capability()),
        "driver": (_output(*query).splitlines() or [""])[0],
        "torch": torch.__version__,
        "triton": triton.__version__,
        "commit": os.environ.get("PHI4_COMMIT") or _commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _commit() -> str:
    """The checkout's commit, with a + if files differ from it."""
    # The row must show that its files were not committed.
    commit = _output("git", "rev-parse", "--short=12", "HEAD")
    dirty = "+" if _output("git", "status", "--porcelain", "--", ".") else ""
    return f"{commit}{dirty}" if commit else "unknown"


def correctness(op: str, implementation: str, result: dict[str, Any]) -> dict[str, Any]:
    """The row that `auto` requires; see dispatch."""
    return {
        "op": op,
        "implementation": implementation,
        "source": registry.source_digest(op, implementation),
        "green": not result["red"],
        "num_checks": result["num_checks"],
        "worst_margin": round(result["worst_margin"], 3),
        **machine(),
    }


def append(path: Path, row: dict[str, Any]) -> None:
    """Add one row; rows are never changed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")
