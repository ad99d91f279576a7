"""What the server process of the ranks imports before it forks them; see tests.support.ranks."""

import gc
import importlib

MODULES = (
    "hypothesis",
    "megatron.core.dist_checkpointing",
    "megatron.core.models.gpt",
    "phi4.cli.train",
    "phi4.engine.engine",
    "phi4.stages.pretrain",
    "phi4.train.session",
    "pytest",
    "torch.distributed",
)

# Imports make no garbage worth a collection, and collections take a sixth of their time.
gc.disable()
for name in MODULES:
    importlib.import_module(name)
gc.enable()

# Else every collection in a rank walks, and so copies, the pages it shares with the server: 0.3 s.
gc.collect()
gc.freeze()
