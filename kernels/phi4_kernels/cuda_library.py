"""The compiled library of csrc's kernels: its path, loading it, and why it is missing.

A build is stored under the hash of its sources and flags, so a library of other sources is never
loaded. Loading needs no GPU: the library's operators also take CPU tensors, which they
compute by the host form of the same arithmetic. `operators.register_cuda` makes them public.
"""

import hashlib
from functools import cache
from pathlib import Path

import torch

from phi4_kernels.errors import ImplementationError

_CHECKOUT = Path(__file__).parents[2]
SOURCES = _CHECKOUT / "csrc"
BUILDS = _CHECKOUT / "build/csrc"
LIBRARY = "libphi4_csrc.so"
NVCC_FLAGS = ("-arch=sm_90a", "-std=c++17", "-O3", "-fmad=false", "-Xcompiler", "-fPIC")
TORCH_TARGET = "-DTORCH_TARGET_VERSION=0x020b000000000000"
"""The library runs with torch 2.11 and newer."""
_SUFFIXES = (".cpp", ".cu", ".cuh", ".h")


def sources() -> list[Path]:
    """The files that a build depends on."""
    return sorted(path for path in SOURCES.rglob("*") if path.suffix in _SUFFIXES)


@cache
def digest() -> str:
    """Hash of sources and flags."""
    # Flags decide what is computed as much as sources do: -fmad=false keeps products unfused.
    found = hashlib.sha256(" ".join((*NVCC_FLAGS, TORCH_TARGET)).encode())
    for path in sources():
        found.update(path.relative_to(SOURCES).as_posix().encode())
        found.update(path.read_bytes())
    return found.hexdigest()[:16]


def folder() -> Path:
    """Path of the build of the current sources, whether or not it exists."""
    return BUILDS / digest()


def missing() -> str | None:
    """Why the library cannot be loaded; None where it is built."""
    if not SOURCES.is_dir():
        return f"no csrc/ next to the package at {SOURCES}; run from a checkout"
    if not (folder() / LIBRARY).exists():
        # Distinguishes a missing build from one of other sources.
        stale = any(BUILDS.glob(f"*/{LIBRARY}"))
        state = "built from other sources" if stale else "not built"
        return f"csrc is {state}; run `make csrc` where nvcc is installed"
    return None


@cache
def load() -> None:
    """Load the library once, which defines its `torch.ops.phi4_native` operators.

    Raises:
        ImplementationError: it is not built, or this torch cannot load it.
    """
    if reason := missing():
        raise ImplementationError(f"implementation 'cuda': {reason}, or use 'torch'")
    try:
        torch.ops.load_library(str(folder() / LIBRARY))
    except OSError as error:
        raise ImplementationError(
            f"implementation 'cuda' cannot be loaded with torch {torch.__version__} ({error}); "
            "expected torch 2.11 or newer; rebuild with `make csrc`, or use 'torch'"
        ) from error
