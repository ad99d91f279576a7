"""Import large packages faster: without garbage collections."""

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def without_collections() -> Iterator[None]:
    """Import packages in this block, at most once per process.

    Imports make no garbage worth a collection, and collections take a third of their time. What is
    imported stays: no later collection walks it again, at the exit neither.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if collects:
            gc.enable()
