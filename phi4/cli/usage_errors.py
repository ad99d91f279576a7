"""Usage errors of the command line in the form of all other user errors."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import typer
from pydantic import ValidationError
from typer.core import TyperGroup

from phi4.errors import UsageError

# Typer exports the error of a bad value, but not the base class of all usage errors.
_TyperUsageError = typer.BadParameter.__base__

_EXPECTED = {
    "int_parsing": "expected an integer",
    "float_parsing": "expected a number",
    "greater_than": "expected more than {gt}",
    "greater_than_equal": "expected at least {ge}",
    "less_than": "expected less than {lt}",
    "less_than_equal": "expected at most {le}",
}
"""By pydantic's name of the error."""
_LIMITS = ("gt", "ge", "lt", "le")


class UsageErrorsGroup(TyperGroup):
    """Commands whose usage errors reach `main` as a `UsageError`: one line and exit code 2.

    Typer prints them as a box of five lines.
    """

    def make_context(self, *arguments: Any, **options: Any) -> Any:
        """Parse the options of the group itself."""
        with _in_one_line():
            return super().make_context(*arguments, **options)

    def invoke(self, ctx: Any) -> Any:
        """Parse and run a command."""
        with _in_one_line():
            return super().invoke(ctx)


@contextmanager
def _in_one_line() -> Iterator[None]:
    try:
        yield
    except _TyperUsageError as error:  # type: ignore[misc]  # a base class is not typed as one
        # A group without a command: its message is the help.
        if type(error).__name__ == "NoArgsIsHelpError":
            raise
        cause = error.__cause__
        if isinstance(cause, ValidationError) and error.param is not None:
            text = f"{_name(error.param)}: {_explain(cause.errors()[0])}"
        else:
            text = " ".join(error.format_message().split())
        text = text.removesuffix(".")
        remedy = f"; see `{error.ctx.command_path} --help`" if error.ctx else ""
        raise UsageError(f"{text}{remedy}") from error


def _name(parameter: Any) -> str:
    """`--option`, or the name of an argument."""
    return max(parameter.opts, key=len) if parameter.opts else parameter.name


def _explain(item: Mapping[str, Any]) -> str:
    """What was expected and what was given."""
    template = _EXPECTED.get(item["type"])
    if template is None:
        return str(item["msg"]).removeprefix("Value error, ")
    limits = {name: f"{limit:g}" for name, limit in item.get("ctx", {}).items() if name in _LIMITS}
    return f"{template.format_map(limits)}, got {item['input']}"
