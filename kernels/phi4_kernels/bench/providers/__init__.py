"""Other implementations to time against; each is imported only when it is asked for.

A provider module's FUNCTIONS make, per entry, what to call with the entry's inputs. The result is
held against the error rule like ours, and the row says whether it meets it.
"""

import importlib
from collections.abc import Callable
from typing import Any

from phi4_kernels.errors import KernelError
from phi4_kernels.registry import Entry

PROVIDERS = (
    "torch",
    "compile",
    "torch-chunked",
    "liger",
    "te",
    "cudnn",
    "flash-attn",
    "flash-attn-deterministic",
    "flash-attn-3",
    "flash-attn-3-deterministic",
    "apex",
)
"""Names for `--against`. `torch` stands for the best of eager and compile."""


class UnavailableError(KernelError):
    """The provider is not installed, or has no such op."""


def function(provider: str, entry: Entry) -> Callable[..., Any]:
    """The provider's form of an entry.

    Raises:
        UnavailableError: see there.
    """
    module = provider.replace("-", "_")
    try:
        found = importlib.import_module(f"phi4_kernels.bench.providers.{module}_provider")
        return found.FUNCTIONS[entry.name](entry)
    except KeyError:
        raise UnavailableError(f"{provider} has no {entry.name}; expected one; drop it") from None
    except ImportError as error:
        raise UnavailableError(f"{provider}: {error}; expected it installed; install it") from None
