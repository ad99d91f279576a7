"""What `patches.py` puts in the place of torch's and megatron-core's checkpoint reader.

It takes an index that was vetted before and reads values only: torch's own unpickles `.metadata`
and every record of bytes without restriction.
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
    """Where records are, and their index; takes the place of a directory in megatron-core's call.

    The stock reader takes no such object, so without the patch a load ends before it reads.
    """

    directory: Path
    metadata: Metadata


class VettedReader(FileSystemReader):
    """Reads the records that a vetted index places; never opens `.metadata`.

    Args:
        source: vetted.
        cache_metadata: as megatron-core asks for; the index is in memory either way.
    """

    def __init__(self, source: VettedSource, cache_metadata: bool = False) -> None:
        super().__init__(source.directory)
        self._metadata = source.metadata

    def read_metadata(self) -> Metadata:
        """The vetted index."""
        return self._metadata

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> torch.futures.Future[None]:
        """See FileSystemReader."""
        with values_only():
            return super().read_data(plan, planner)


def load_bytes_as_values(planner: DefaultLoadPlanner, item: ReadItem, value: io.BytesIO) -> None:
    """Replaces `DefaultLoadPlanner.load_bytes`, which runs what the record's pickle asks for."""
    name, loaded = item.dest_index.fqn, load_values(value)
    if planner.flatten_state_dict:
        set_element(planner.original_state_dict, planner.mappings[name], loaded)
    else:
        planner.state_dict[name] = loaded


def load_values(stream: io.BytesIO) -> Any:
    """Tensors, numbers, text and containers of them from a `torch.save` file.

    Raises:
        CheckpointError: it holds anything else.
        Exception: what torch raises for a damaged file.
    """
    with values_only():
        # Explicit, because an environment variable can turn the default off.
        return torch.load(stream, map_location="cpu", weights_only=True)


@contextmanager
def values_only() -> Iterator[None]:
    """torch's weights-only loader, without the classes that megatron-core adds to its list.

    Raises:
        CheckpointError: instead of torch's advice to load without the restriction.
    """
    added = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    try:
        yield
    except pickle.UnpicklingError:
        raise CheckpointError(
            "a record is damaged, or holds something else than tensors, numbers and text"
        ) from None
    finally:
        torch.serialization.add_safe_globals(added)
