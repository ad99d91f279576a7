"""The data room: tokenizer, token files, and a training stream that is a function, not an index.

It knows nothing of ranks: `dp_rank` and `dp_size` are plain numbers that the caller hands in.
"""

from phi4.data.batch import Batch, build_batch
from phi4.data.loader import HeldOut, Loader
from phi4.data.tokenizer import Tokenizer, TokenizerFacts, load_tokenizer

__all__ = [
    "Batch",
    "HeldOut",
    "Loader",
    "Tokenizer",
    "TokenizerFacts",
    "build_batch",
    "load_tokenizer",
]
