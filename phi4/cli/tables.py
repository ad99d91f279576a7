"""The console for tables, which is as wide as the terminal, and wide in a file or a pipe."""

import sys

from rich.console import Console


def table_console(piped_width: int = 140) -> Console:
    """The console.

    Args:
        piped_width: columns in a file or a pipe, so that rows stay unwrapped there.
    """
    return Console(width=None if sys.stdout.isatty() else piped_width)
