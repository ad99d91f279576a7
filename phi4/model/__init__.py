"""Phi-4 on paper: its shape in numbers (`shape`) and the names of its tensors (`names`)."""
