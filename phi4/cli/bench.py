"""`phi4 bench`: benchmarks on this machine."""

import typer

app = typer.Typer(no_args_is_help=True)


@app.callback()
def _group() -> None:
    """A single command stays a command of the group."""


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    add_help_option=False,
)
def kernels(context: typer.Context) -> None:
    """Time the kernels against their floors and other implementations; --help lists the options."""
    from phi4_kernels.bench.command import main

    raise typer.Exit(main(context.args))
