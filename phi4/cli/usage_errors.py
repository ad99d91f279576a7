"""A group of commands whose misused options and arguments are one line, like other user errors."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer
from typer.core import TyperGroup

from phi4.errors import Phi4Error

# Typer exports the error of a bad value, but not the common base of what a user can mistype.
_UsageError = typer.BadParameter.__base__


class UsageErrorsGroup(TyperGroup):
    """Commands whose usage errors reach `main` as a `Phi4Error`: one line and exit code 2.

    Without it they are a box of five lines.
    """

    def make_context(self, *arguments: Any, **options: Any) -> Any:
        """Parse the options of the group itself."""
        with _in_one_line():
            return super().make_context(*arguments, **options)

    def invoke(self, ctx: Any) -> Any:
        """Parse and run the asked command."""
        with _in_one_line():
            return super().invoke(ctx)


@contextmanager
def _in_one_line() -> Iterator[None]:
    try:
        yield
    except _UsageError as error:  # type: ignore[misc]  # a base class is not typed as one
        # A group without a command: its message is the help.
        if type(error).__name__ == "NoArgsIsHelpError":
            raise
        text = " ".join(error.format_message().split()).removesuffix(".")
        remedy = f"; see `{error.ctx.command_path} --help`" if error.ctx else ""
        raise Phi4Error(f"{text}{remedy}") from error
