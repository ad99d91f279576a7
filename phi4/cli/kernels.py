"""`phi4 kernels`: which implementations of the ops exist, and what is proven of them."""

import sys

import typer
from rich.console import Console
from rich.table import Table

app = typer.Typer(help="Implementations of the ops.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """A single command stays a command of the group."""


@app.command()
def status() -> None:
    """Every op and implementation, its state, and the GPU run that says so."""
    from phi4_kernels import dispatch

    table = Table(title="`auto` takes what is proven on the GPU at hand; the rest runs when named")
    columns = ("op", "implementation", "state", "device", "commit", "date")
    for column in columns:
        table.add_column(column)
    for row in dispatch.status():
        table.add_row(*(row[column] for column in columns))
    Console(width=140 if not sys.stdout.isatty() else None).print(table)
