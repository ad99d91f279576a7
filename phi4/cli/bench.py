"""`phi4 bench`: benchmarks on this machine."""

from typing import NoReturn

import typer

from phi4.errors import UsageError

app = typer.Typer(no_args_is_help=True)


@app.callback()
def _group() -> None:
    """Make a single command a command of the group."""


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    add_help_option=False,
)
def kernels(context: typer.Context) -> None:
    """Time the kernels against their floors and other implementations; see --help."""
    from phi4_kernels.bench.command import main, parser

    def refuse(message: str) -> NoReturn:
        raise UsageError(f"{message}; see `phi4 bench kernels --help`")

    options = parser()
    # argparse would print its usage and exit.
    options.error = refuse  # type: ignore[method-assign]  # its way to change this is a subclass
    options.parse_args(context.args)
    raise typer.Exit(main(context.args))
