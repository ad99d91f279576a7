"""docs/cli.md and docs/recipe.md say what the commands and the schema say, and every one does."""

import inspect
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import typer
from typer.core import TyperGroup
from typer.main import get_command

from phi4.cli import COMMANDS, GROUPS, make_app
from tools.command_reference import commands
from tools.marked_block import replace_block
from tools.references import blocks


def test_pages_say_what_the_code_says(monkeypatch: pytest.MonkeyPatch) -> None:
    # What is written must not depend on the terminal.
    monkeypatch.setenv("COLUMNS", "40")
    for page, (name, content) in blocks().items():
        text = page.read_text(encoding="utf-8")
        assert replace_block(text, name, content) == text, "run: make references"


def test_every_command_and_parameter_has_a_meaning() -> None:
    found = commands(make_app(COMMANDS | GROUPS))
    assert len(found) > 50
    silent = [command.path for command in found if not command.text]
    silent += [
        f"{command.path} {row.names}"
        for command in found
        for row in command.parameters
        if not row.meaning
    ]
    assert silent == []


def leaves(command: Any) -> list[Any]:
    if isinstance(command, TyperGroup):
        return [leaf for below in command.commands.values() for leaf in leaves(below)]
    return [command]


def test_help_of_every_command_is_its_docstring() -> None:
    for command in leaves(get_command(make_app(COMMANDS | GROUPS))):
        docstring = inspect.getdoc(inspect.unwrap(command.callback))
        assert inspect.cleandoc(command.help) == docstring, command.name


def planted(function: Any) -> typer.Typer:
    app, group = typer.Typer(), typer.Typer()
    group.command("make")(function)
    group.command("other")(lambda: None)
    app.add_typer(group, name="data")
    return app


def make(
    inputs: Annotated[list[Path], typer.Argument(help="In.")],
    rest: Annotated[str | None, typer.Argument(metavar="REST", help="More.")] = None,
    seed: Annotated[int, typer.Option(min=0, max=9, help="Seed.")] = 0,
    rate: Annotated[float, typer.Option(help="Rate.")] = 0.5,
    form: Annotated[Literal["a", "b"], typer.Option(help="Form.")] = "b",
    chat: Annotated[bool, typer.Option(help="Chat.")] = True,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Quiet.")] = False,
    only: Annotated[list[str] | None, typer.Option(metavar="NAME", help="Only.")] = None,
    out: Annotated[Path, typer.Option(help="Out.")] = ...,
    workers: Annotated[int, typer.Option(default_factory=lambda: 3, help="Workers.")] = ...,
    hidden: Annotated[bool, typer.Option(hidden=True)] = False,
) -> None:
    """Make.

    In more words.
    """


def test_planted_command_is_told_in_full() -> None:
    command = commands(planted(make))[0]
    assert command.usage == "phi4 data make [OPTIONS] INPUTS... [REST]"
    assert command.text == "Make.\n\nIn more words."
    assert [tuple(row) for row in command.parameters] == [
        ("INPUTS", "PATH", "required", "In."),
        ("REST", "TEXT", "", "More."),
        ("--seed", "INTEGER >= 0, <= 9", "0", "Seed."),
        ("--rate", "NUMBER", "0.5", "Rate."),
        ("--form", "a|b", "b", "Form."),
        ("--chat / --no-chat", "", "--chat", "Chat."),
        ("--quiet / -q", "", "", "Quiet."),
        ("--only", "NAME", "", "Only."),
        ("--out", "PATH", "required", "Out."),
        ("--workers", "INTEGER", "", "Workers."),
    ]
