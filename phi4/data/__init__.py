"""Data: tokenizers, token files, and a training stream that is a function, not an index.

Nothing here knows of ranks: `dp_rank` and `dp_size` are plain numbers that the caller hands in.
"""
