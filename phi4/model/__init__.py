"""Phi-4 on paper: its shape in numbers (`shape`), the names of its tensors (`names`) and what it
can be asked (`generation_request`)."""
