"""Filters of rows before tokenization: duplicates, corrupted text, languages.

All filters process rows in the same way: rows are read line by line, analysed in parallel, and
decided on in order. A row goes either unchanged to the output or with a reason to the quarantine.
"""

from phi4.data.screens.quality.rows import RowError, read_lines, text_of
from phi4.data.screens.quality.screen import Screened, screen

__all__ = ["RowError", "Screened", "read_lines", "screen", "text_of"]
