"""Checks that all ranks start with the same code, packages and recipe.

A node with an older checkout, another torch or a stale copy of the recipe would train without an
error and corrupt the run. Files are compared by content, since a checkout may be dirty.
"""

import hashlib
import importlib.util
import platform as machine
import socket
from collections import Counter
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import msgspec

from phi4.config import Recipe, dump_toml
from phi4.engine.agreement import gathered
from phi4.engine.platform import Platform
from phi4.errors import PlatformError

_CODE = ("phi4", "phi4_kernels")
_PACKAGES = ("torch", "megatron-core", "triton", "numpy", "transformer-engine", "msgspec")
_NAMED_RANKS = 8


class Program(msgspec.Struct, frozen=True):
    """What one rank is about to run.

    Attributes:
        rank: rank of the process.
        host: name of its machine.
        code: hash of the source files of phi4.
        packages: Python and package versions.
        recipe: hash of the recipe.
    """

    rank: int
    host: str
    code: str
    packages: str
    recipe: str


def program_of(rank: int, recipe: Recipe) -> Program:
    """What this process is about to run; reads the source files of phi4, 2 MB."""
    return Program(
        rank=rank,
        host=socket.gethostname(),
        code=_code_sha256()[:12],
        packages=", ".join([f"python {machine.python_version()}", *filter(None, _versions())]),
        recipe=hashlib.sha256(dump_toml(recipe).encode()).hexdigest()[:12],
    )


def differences(programs: Sequence[Program]) -> list[str]:
    """A line for each of code, packages and recipe in which some ranks differ from most.

    Args:
        programs: the programs of all ranks.
    """
    lines = []
    for field in ("code", "packages", "recipe"):
        values = Counter(getattr(program, field) for program in programs)
        (most, _), *_ = values.most_common(1)
        other = [program for program in programs if getattr(program, field) != most]
        if other:
            more = f" and {len(other) - _NAMED_RANKS} more" if other[_NAMED_RANKS:] else ""
            named = ", ".join(
                f"rank {program.rank} on {program.host} ({getattr(program, field)})"
                for program in other[:_NAMED_RANKS]
            )
            lines.append(f"{field} differs from that of most ranks ({most}) on {named}{more}")
    return lines


def require_same_start(platform: Platform, recipe: Recipe) -> None:
    """Refuse a start in which ranks differ; nothing is written before.

    Raises:
        PlatformError: on every rank; names the ranks that differ and their hosts.

    Collectives: one all-gather of some 200 bytes over all ranks.
    """
    if platform.world_size == 1:
        return
    if lines := differences(gathered(platform, program_of(platform.rank, recipe))):
        raise PlatformError(
            f"{'; '.join(lines)}; start all ranks from one checkout, one environment and one recipe"
        )


def _code_sha256() -> str:
    digest = hashlib.sha256()
    for package in _CODE:
        spec = importlib.util.find_spec(package)
        for root in (spec and spec.submodule_search_locations) or ():
            for path in sorted(Path(root).rglob("*.py")):
                digest.update(path.relative_to(root).as_posix().encode() + b"\0")
                digest.update(path.read_bytes())
    return digest.hexdigest()


def _versions() -> list[str]:
    found = []
    for name in _PACKAGES:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return found
