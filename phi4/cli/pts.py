"""`phi4 pts`: pivotal tokens, and which checkpoint to go on with."""

import typer

from phi4.cli import pts_pairs, pts_select
from phi4.cli.file_errors import FileErrorsGroup

app = typer.Typer(
    cls=FileErrorsGroup,
    no_args_is_help=True,
    help="Pivotal tokens: search, pairs, and which checkpoint to go on with.",
)
pts_pairs.register(app)
pts_select.register(app)


@app.callback()
def _group() -> None:
    """Pivotal tokens: search, pairs, and which checkpoint to go on with."""
