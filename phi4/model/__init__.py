"""Phi-4 on paper: its shape, the names of its tensors, and what it can be asked."""
