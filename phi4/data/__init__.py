"""Data: tokenizers, token files, and a training stream computed from a seed, without a stored
index.

This package does not depend on torch.distributed: `dp_rank` and `dp_size` are plain numbers that
the caller passes.
"""
