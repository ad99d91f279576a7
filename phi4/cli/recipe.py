"""`phi4 recipe`: the keys that a recipe may set."""

import json
import shutil
import textwrap
from collections.abc import Iterator
from dataclasses import asdict
from typing import Annotated

import typer

from phi4.config.reference import KIND_TEXTS, SectionReference, find, reference

app = typer.Typer(no_args_is_help=True)


@app.callback()
def _group() -> None:
    """Make a single command a command of the group."""


@app.command()
def keys(
    section: Annotated[
        str | None,
        typer.Argument(
            metavar="SECTION",
            help="A section (optim, data.sources) or one key (optim.learning_rate).",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON array of all keys.")] = (
        False
    ),
) -> None:
    """List the keys of a recipe: type and range, default, kind and meaning.

    The kind says what a change means for a run that resumes. None is a key that is not set: leave
    it out of the file, or write `section.key=None` on the command line. With --json a key is an
    object with key, type, required, default, kind and text.
    """
    sections = find(section) if section else reference()
    if as_json:
        rows = [asdict(key) for found in sections for key in found.keys]
        typer.echo(json.dumps(rows, indent=1, ensure_ascii=False))
        return
    width = min(100, shutil.get_terminal_size((100, 24)).columns)
    for line in _lines(sections, width):
        typer.echo(line)


def _lines(sections: tuple[SectionReference, ...], width: int) -> Iterator[str]:
    """Every key with its default and type, and its meaning indented below it."""
    for section in sections:
        yield from textwrap.wrap(f"{section.header} {section.text}", width, break_on_hyphens=False)
        for key in section.keys:
            yield f"  {key.key} = {key.default_text}  ({key.type}; {key.kind})"
            indent = " " * 6
            yield from textwrap.wrap(
                key.text,
                width,
                initial_indent=indent,
                subsequent_indent=indent,
                break_on_hyphens=False,
            )
        yield ""
    for kind, text in KIND_TEXTS.items():
        yield f"{kind}: {text}"
