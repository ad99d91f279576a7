"""The commands of `phi4` with their arguments and options, as Markdown.

Names, defaults and help texts are read from the commands as typer builds them, types from the
signatures: what typer prints depends on its version and on the width of the terminal.
"""

import argparse
import inspect
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

import typer
from phi4_kernels.bench.command import parser as bench_parser
from typer.core import TyperGroup
from typer.main import get_command

from phi4.cli import COMMANDS, GROUPS, make_app

_VALUES = {int: "INTEGER", float: "NUMBER", str: "TEXT", Path: "PATH"}
REQUIRED = "required"
_OWN_PARSERS = {"phi4 bench kernels": bench_parser}
"""Commands that hand their options to argparse."""


class Parameter(NamedTuple):
    """An argument or an option: a row of a command's table."""

    names: str
    value: str
    default: str
    meaning: str


class Command(NamedTuple):
    """A command that can be run.

    Attributes:
        path: with its group, `phi4 data tokenize`.
        usage: the line that calls it.
        text: its docstring.
        parameters: arguments first, then options; hidden ones are left out.
    """

    path: str
    usage: str
    text: str
    parameters: tuple[Parameter, ...]


def commands(app: typer.Typer) -> tuple[Command, ...]:
    """Return every command of every group, in the order of `phi4 --help`."""
    return tuple(_commands(get_command(app), "phi4"))


def page() -> str:
    """phi4's commands as Markdown, a section each; a group's commands below the group."""
    lines = ["| command | |", "|---|---|"]
    for name, text in (COMMANDS | GROUPS).items():
        lines.append(f"| [`phi4 {name}`](#phi4-{name}) | {_cell(text)} |")
    group = None
    for command in commands(make_app(COMMANDS | GROUPS)):
        _, name, *below = command.path.split()
        if below and name != group:
            lines += ["", f"## phi4 {name}", "", GROUPS[name]]
        group = name
        lines += ["", f"{'###' if below else '##'} {command.path}", "", *_section(command)]
    return "\n".join(lines)


def _section(command: Command) -> Iterator[str]:
    yield from ("```", command.usage, "```", "", command.text)
    if command.parameters:
        yield from ("", "| argument or option | value | default | meaning |", "|---|---|---|---|")
        for row in command.parameters:
            cells = (_code(row.names), _code(row.value), _code(row.default), row.meaning)
            yield f"| {' | '.join(map(_cell, cells))} |"


def _code(text: str) -> str:
    return f"`{text}`" if text and text != REQUIRED else text


def _cell(text: str) -> str:
    """Text that stays in its cell."""
    return " ".join(text.split()).replace("|", r"\|")


def _commands(command: Any, path: str) -> Iterator[Command]:
    if isinstance(command, TyperGroup):
        for name, below in command.commands.items():
            yield from _commands(below, f"{path} {name}")
        return
    shown = [parameter for parameter in command.params if not parameter.hidden]
    arguments = [one for one in shown if one.param_type_name == "argument"]
    options = [one for one in shown if one.param_type_name == "option"]
    hints = get_type_hints(inspect.unwrap(command.callback), include_extras=True)
    rows = [_parameter(one, hints.get(one.name)) for one in (*arguments, *options)]
    if path in _OWN_PARSERS:
        rows += _of_argparse(_OWN_PARSERS[path])
    words = [path, *(["[OPTIONS]"] if len(rows) > len(arguments) else []), *map(_usage, arguments)]
    yield Command(path, " ".join(words), inspect.cleandoc(command.help or ""), tuple(rows))


def _usage(argument: Any) -> str:
    """Return an argument as the usage line has it: optional ones in brackets."""
    name = argument.metavar or argument.name.upper()
    if "[" in name:
        return name
    dots = "..." if argument.nargs != 1 else ""
    return f"{name}{dots}" if argument.required else f"[{name}]{dots}"


def _parameter(parameter: Any, hint: Any) -> Parameter:
    is_option = parameter.param_type_name == "option"
    names = " / ".join([*parameter.opts, *parameter.secondary_opts])
    value, limits = _value(hint)
    if is_option and parameter.metavar:
        value = parameter.metavar
    return Parameter(
        names if is_option else parameter.metavar or parameter.name.upper(),
        " ".join([value, ", ".join(limits)]).strip(),
        _default(parameter),
        parameter.help or "",
    )


def _default(parameter: Any) -> str:
    """A default that says something; switches that are off and values that are unset say none."""
    default = parameter.default
    if parameter.required:
        return REQUIRED
    if default is True and parameter.param_type_name == "option":
        return parameter.opts[0]
    if default is None or default is False or default is ... or default == "":
        return ""
    if callable(default) or not parameter.show_default:
        return ""
    return str(default)


def _value(hint: Any) -> tuple[str, list[str]]:
    """Return what an annotated type takes, and its limits."""
    limits: list[str] = []
    while get_origin(hint) in (Annotated, Union, types.UnionType, list):
        inner, *extras = [one for one in get_args(hint) if one is not type(None)]
        for extra in extras:
            bounds = ((">=", getattr(extra, "min", None)), ("<=", getattr(extra, "max", None)))
            limits += [f"{sign} {bound}" for sign, bound in bounds if bound is not None]
        hint = inner
    if get_origin(hint) is Literal:
        return "|".join(get_args(hint)), limits
    return _VALUES.get(hint, ""), limits


def _of_argparse(parser: Callable[[], argparse.ArgumentParser]) -> Iterator[Parameter]:
    for action in parser()._actions:
        if isinstance(action, argparse._HelpAction):
            continue
        choices = "|".join(action.choices) if action.choices else _VALUES.get(action.type, "TEXT")
        value = "" if action.nargs == 0 else choices
        default = str(action.default) if action.default not in (None, False) else ""
        yield Parameter(", ".join(action.option_strings), value, default, action.help or "")
