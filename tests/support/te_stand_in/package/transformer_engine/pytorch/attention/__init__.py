"""Attention, which the engine replaces."""
