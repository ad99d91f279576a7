"""`phi4 pts`: tokens that decide whether an answer becomes right."""

import typer

from phi4.cli import pts_pairs, pts_search, pts_select, pts_show
from phi4.cli.file_errors import FileErrorsGroup

app = typer.Typer(cls=FileErrorsGroup, no_args_is_help=True)
for command in (pts_search, pts_show, pts_pairs, pts_select):
    command.register(app)


@app.callback()
def _group() -> None:
    """Make a single command a command of the group."""
