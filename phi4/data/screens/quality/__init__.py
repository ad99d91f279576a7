"""Screens of rows before they become tokens: duplicates, corrupted text, languages.

Every screen is the same stream: rows are read line by line, analysed in parallel, decided on in
their order. A row goes either unchanged into the output or with its reason into the quarantine.
"""

from phi4.data.screens.quality.rows import RowError, read_lines, text_of
from phi4.data.screens.quality.screen import Screened, screen

__all__ = ["RowError", "Screened", "read_lines", "screen", "text_of"]
