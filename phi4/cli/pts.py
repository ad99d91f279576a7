"""`phi4 pts`: pivotal tokens."""

import typer

from phi4.cli import pts_pairs
from phi4.cli.file_errors import FileErrorsGroup

app = typer.Typer(cls=FileErrorsGroup, no_args_is_help=True, help="Pivotal tokens.")
pts_pairs.register(app)


@app.callback()
def _group() -> None:
    """Pivotal tokens."""
