"""The engine: megatron-core on CUDA over NCCL or on CPU over gloo, with plain values as its
interface.

The only package that imports megatron.core or transformer_engine. Its callers use recipes, batches,
objectives and step results.
"""

import warnings

from phi4.imports import without_collections

with without_collections():
    import phi4.engine.te_import  # noqa: F401, before megatron-core
    from phi4.engine.deferred_compile import deferred_compile

    with warnings.catch_warnings(), deferred_compile():
        # "Apex is not installed" and the like: the engine has its own norm and Adam.
        warnings.simplefilter("ignore")
        import megatron.core.dist_checkpointing
        import megatron.core.models.gpt
        import megatron.core.optimizer
        import megatron.core.pipeline_parallel  # noqa: F401
