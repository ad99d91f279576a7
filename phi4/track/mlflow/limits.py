"""MLflow's limits: characters of names, lengths of values, sizes of requests."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TypeVar

from phi4.track.mlflow.store import cut
from phi4.track.mlflow.troubles import without_password

T = TypeVar("T")

NAME_CHARACTERS = 250
PARAM_CHARACTERS = 6000
TAG_CHARACTERS = 8000
BATCH_ENTRIES = 100
"""Parameters and tags of one request together."""


def mlflow_name(key: str) -> str:
    """Replace characters of a key that some version of MLflow does not allow in names."""
    return re.sub(r"[^\w\-. /]", "_", key)[:NAME_CHARACTERS]


def batches(entries: Sequence[T]) -> Iterator[Sequence[T]]:
    """Split parameters or tags into requests of the allowed size."""
    return (entries[i : i + BATCH_ENTRIES] for i in range(0, len(entries), BATCH_ENTRIES))


def as_tags(values: Mapping[str, object]) -> dict[str, str]:
    """Convert to valid tags; empty and missing values are omitted."""
    return {
        mlflow_name(key): cut(without_password(str(value)), TAG_CHARACTERS)
        for key, value in values.items()
        if value not in (None, "")
    }
