"""Replacements for torch's and megatron-core's checkpoint reader, installed by `patches.py`.

They take an index that has been validated and read values only: torch's own reader unpickles
`.metadata` and every record of bytes without restriction.
"""

import io
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint._traverse import set_element
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem

from phi4.errors import CheckpointError


@dataclass(frozen=True)
class VettedSource:
    """Location of records and their validated index; passed instead of a directory to
    megatron-core.

    The stock reader does not accept such an object, so without the patch a load fails before it
    reads anything.
    """

    directory: Path
    metadata: Metadata


class VettedReader(FileSystemReader):
    """Reads the records in a validated index; never opens `.metadata`.

    Args:
        source: validated source.
        cache_metadata: required by megatron-core; the index is in memory either way.
    """

    def __init__(self, source: VettedSource, cache_metadata: bool = False) -> None:
        super().__init__(source.directory)
        self._metadata = source.metadata

    def read_metadata(self) -> Metadata:
        """Return the validated index."""
        return self._metadata

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> torch.futures.Future[None]:
        """See FileSystemReader."""
        with values_only():
            return super().read_data(plan, planner)


def load_bytes_as_values(planner: DefaultLoadPlanner, item: ReadItem, value: io.BytesIO) -> None:
    """Replaces `DefaultLoadPlanner.load_bytes`, which executes the record's pickle."""
    name, loaded = item.dest_index.fqn, load_values(value)
    if planner.flatten_state_dict:
        set_element(planner.original_state_dict, planner.mappings[name], loaded)
    else:
        planner.state_dict[name] = loaded


def load_values(stream: io.BytesIO) -> Any:
    """Load tensors, numbers, text and containers of them from a `torch.save` file.

    Raises:
        CheckpointError: it contains anything else.
        Exception: what torch raises for a damaged file.
    """
    with values_only():
        # Explicit, because an environment variable can disable the default.
        return torch.load(stream, map_location="cpu", weights_only=True)


@contextmanager
def values_only() -> Iterator[None]:
    """Use torch's weights-only loader without the classes that megatron-core adds to its list.

    Raises:
        CheckpointError: instead of torch's advice to load without the restriction.
    """
    added = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    try:
        yield
    except pickle.UnpicklingError:
        raise CheckpointError(
            "a record is damaged, or contains something other than tensors, numbers and text"
        ) from None
    finally:
        torch.serialization.add_safe_globals(added)
