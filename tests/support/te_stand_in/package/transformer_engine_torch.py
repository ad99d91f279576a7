"""Transformer Engine's own library, which only has to be there."""
