"""The engine: megatron-core on CUDA over NCCL or on CPU over gloo, with plain values as its
interface.

The only package that imports megatron.core or transformer_engine. Its callers use recipes, batches,
objectives and step results.
"""

import contextlib
import gc
import warnings
from collections.abc import Iterator


@contextlib.contextmanager
def _without_collections() -> Iterator[None]:
    """Imports make no garbage worth a collection, and collections take a third of their time."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        # What is imported stays: no later collection, at the exit neither, walks it again.
        gc.freeze()
        if collects:
            gc.enable()


with _without_collections():
    import phi4.engine.te_import  # noqa: F401, before megatron-core
    from phi4.engine.deferred_compile import deferred_compile

    with warnings.catch_warnings(), deferred_compile():
        # "Apex is not installed" and the like: the engine has its own norm and Adam.
        warnings.simplefilter("ignore")
        import megatron.core.dist_checkpointing
        import megatron.core.models.gpt
        import megatron.core.optimizer
        import megatron.core.pipeline_parallel  # noqa: F401
