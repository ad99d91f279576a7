"""The command line: one file per group of commands.

An error of the user is one line per broken rule on stderr, without a traceback, and its exit code.
"""

import sys
from collections.abc import Container, Sequence
from importlib import import_module, metadata
from typing import Annotated

import typer

from phi4 import __version__
from phi4.cli.usage_errors import UsageErrorsGroup
from phi4.errors import Phi4Error, error_text
from phi4.launch.notices import hold_notices

COMMANDS = {
    "train": "Train a recipe, or resume its run.",
    "generate": "Continue texts or answer conversations with a model.",
    "chat": "Chat with a model in the terminal.",
    "serve": "Serve a model over HTTP: OpenAI's and Ollama's APIs, and a chat page.",
    "plan": "Memory per GPU of a recipe, before it runs.",
    "report": "Write an HTML report of one run or of several side by side.",
    "demo": "Train a small Phi-4 on this machine, from corpus to text.",
}
GROUPS = {
    "launch": "Run on a Slurm cluster or on this machine; check machines before a run.",
    "sweep": "Grids of small runs: data mixtures, learning rates, transfer to larger scales.",
    "data": "Build, inspect and check token files.",
    "answers": "Sample a model's answers to questions and score them.",
    "pts": "Pivotal token search, preference pairs from it, checkpoint selection.",
    "judge": "Preference pairs of full answers, ordered by a judge or an oracle.",
    "unknown": "Training rows that teach a model to refuse what it does not know.",
    "dpo": "Log-probabilities of the DPO reference model.",
    "recipe": "Keys of a recipe: type, default, kind and meaning.",
    "model": "Parameters, FLOPs and KV cache size of a model.",
    "convert": "Convert to and from Hugging Face checkpoints.",
    "track": "Compare runs; synchronise them with MLflow.",
    "verify": "Checks to run on this machine: parity, resume, leak, preempt, kills.",
    "bench": "Benchmarks of the kernels.",
    "sandbox": "The sandbox for programs that a model wrote.",
    "kernels": "Implementations of the ops and their validation.",
}


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `phi4`."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    words = [word for word in arguments if not word.startswith("-")]
    if words[:1] in (["train"], ["serve"]) or words[:2] == ["launch", "local"]:
        # Imports take seconds: a signal that arrives meanwhile is kept until the run can save or
        # the server can end.
        hold_notices()
    try:
        make_app((_asked(arguments),))(arguments, prog_name="phi4")
    except Phi4Error as error:
        typer.echo(error_text(type(error).__name__, str(error)), err=True)
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
        help="Train, inspect and convert Phi-4 models. Start with `phi4 demo`.\n\nWrong input ends "
        "with exit code 2 and one line per broken rule on stderr, without a traceback.",
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
    """Print the versions of phi4, torch and megatron-core without importing the last two."""
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
