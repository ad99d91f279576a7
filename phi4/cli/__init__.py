"""The command line: one file per group of commands, every user error one line and its exit code."""

import sys
from collections.abc import Container, Sequence
from importlib import import_module, metadata
from typing import Annotated

import typer

from phi4 import __version__
from phi4.cli.usage_errors import UsageErrorsGroup
from phi4.errors import Phi4Error
from phi4.launch.notices import hold_notices

COMMANDS = {
    "train": "Train a recipe; resumes where it stopped.",
    "generate": "Continue texts, or answer conversations, with a model in any layout.",
    "chat": "Talk with a model in the terminal.",
    "serve": "A model over HTTP: the APIs of OpenAI and Ollama, and a chat page.",
    "plan": "Bytes per GPU of a recipe, before it runs.",
    "report": "A run, or several side by side, as an HTML page.",
    "demo": "Train a small Phi-4 on this machine, from corpus to text.",
}
GROUPS = {
    "launch": "Runs on a Slurm cluster, or here; are the machines fit for it?",
    "sweep": "Grids of small runs: mixtures, learning rates, what carries over to larger ones.",
    "data": "Token files: build, inspect, check.",
    "answers": "Answers of a model to questions: draw them, score them.",
    "pts": "Pivotal tokens: search, pairs, and which checkpoint to go on with.",
    "judge": "Pairs of whole answers, ordered by a judge or an oracle.",
    "unknown": "Rows that teach a model to say what it does not know.",
    "dpo": "Preferences: the reference model's log-probabilities.",
    "recipe": "Keys of the recipe: type, default, kind and meaning.",
    "model": "Phi-4's shape in numbers.",
    "convert": "Hugging Face checkpoints in and out.",
    "track": "Runs compared, and what MLflow shows of them.",
    "verify": "Proofs to run on this machine: parity, resume, leak, preempt, kills.",
    "bench": "Benchmarks of the kernels.",
    "sandbox": "The sandbox that runs programs of a model: does it hold here?",
    "kernels": "Implementations of the ops and what is proven of them.",
}


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `phi4`."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    words = [word for word in arguments if not word.startswith("-")]
    if words[:1] in (["train"], ["serve"]) or words[:2] == ["launch", "local"]:
        # A notice from here on is kept until the run can save, or the server end; imports take
        # seconds.
        hold_notices()
    try:
        make_app((_asked(arguments),))(arguments, prog_name="phi4")
    except Phi4Error as error:
        typer.echo(f"{type(error).__name__}: {error}", err=True)
        sys.exit(error.exit_code)


def make_app(loaded: Container[str | None]) -> typer.Typer:
    """The typer app, with the modules of these commands loaded and the others only named.

    Loading every command would import torch for `phi4 --help`.
    """
    app = typer.Typer(
        cls=UsageErrorsGroup,
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode="markdown",
        help="Train, inspect and convert Phi-4 models. Start with `phi4 demo`.",
    )
    app.callback()(_options)
    for name, text in (COMMANDS | GROUPS).items():
        if name not in loaded:
            app.command(name, help=text)(lambda: None)
            continue
        module = import_module(f"phi4.cli.{name}")
        if name in GROUPS:
            app.add_typer(module.app, name=name, help=text)
        else:
            # Its own help is the docstring of its function.
            app.command(name, short_help=text)(getattr(module, name))
    return app


def _asked(arguments: Sequence[str]) -> str | None:
    """The command's name."""
    return next((word for word in arguments if not word.startswith("-")), None)


def _print_versions(asked: bool) -> None:
    """phi4, and the two packages whose version decides what it can do; neither is imported."""
    if not asked:
        return
    typer.echo(f"phi4 {__version__}")
    for name in ("torch", "megatron-core"):
        try:
            typer.echo(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            typer.echo(f"{name} is not installed")
    raise typer.Exit


def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            callback=_print_versions,
            is_eager=True,
            help="Print the versions of phi4, torch and megatron-core.",
        ),
    ] = False,
) -> None:
    """Options of `phi4` itself."""
