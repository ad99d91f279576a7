"""Import Transformer Engine if this machine can use it, before megatron-core is imported.

megatron-core imports any `transformer_engine` it finds, in some thirty files, and only handles
ImportError: one that cannot find cuDNN would break `import megatron.core`, and thus a run that
needs no FP8. It is therefore imported here first, and hidden from the process if it is unusable.
"""

import importlib
import sys
import warnings
from dataclasses import dataclass

import torch

SUPPORTED = ("2.9", "2.10", "2.11")
"""The versions supported by megatron-core 0.16; as in the extra `te` of pyproject.toml."""

_PACKAGES = ("transformer_engine", "transformer_engine_torch")


@dataclass(frozen=True)
class TransformerEngine:
    """The state of Transformer Engine in this process.

    Attributes:
        version: imported version; empty if there is none.
        problem: why there is none; empty if there is one.
    """

    version: str
    problem: str


def import_or_hide() -> TransformerEngine:
    """Import Transformer Engine, or make every later import of it fail as if it were not installed.
    It is not tried if torch finds no CUDA device.
    """
    found = _imported()
    if found.problem:
        for name in [name for name in sys.modules if name.partition(".")[0] in _PACKAGES]:
            del sys.modules[name]
        # An import of a name whose entry is None raises ModuleNotFoundError.
        for name in _PACKAGES:
            sys.modules[name] = None  # type: ignore[assignment]  # typeshed has no such entries
    return found


def _imported() -> TransformerEngine:
    if not torch.cuda.is_available():
        return TransformerEngine("", "it is imported on machines with a CUDA device only")
    try:
        with warnings.catch_warnings():
            # It warns about its own names that megatron-core imports.
            warnings.simplefilter("ignore")
            package = importlib.import_module("transformer_engine")
            importlib.import_module("transformer_engine.pytorch")
        version = str(package.__version__)
    except ModuleNotFoundError as error:
        if error.name == "transformer_engine":
            return TransformerEngine("", "it is not installed")
        return TransformerEngine("", f"its import raised {_line(error)}")
    except Exception as error:  # a missing or mismatched library can raise anything
        return TransformerEngine("", f"its import raised {_line(error)}")
    if ".".join(version.split(".")[:2]) not in SUPPORTED:
        return TransformerEngine("", f"version {version} is installed")
    return TransformerEngine(version, "")


def _line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


TRANSFORMER_ENGINE = import_or_hide()
"""The state seen by megatron-core, here and in every later import."""
