"""A stand-in of Transformer Engine for tests on a CPU: its interface, and torch's arithmetic.

It has the names that megatron-core 0.16.1 imports, and of these it carries out what the engine
uses: a parallel linear in FP8, its recipes, contexts, histories and recompute. Calls are checked
against `signatures.json`, which comes from the published sources of the version that the test asks
for; all else raises.
"""

from importlib.metadata import version

from transformer_engine import common, pytorch

__version__ = version("transformer_engine")
__all__ = ["common", "pytorch"]
