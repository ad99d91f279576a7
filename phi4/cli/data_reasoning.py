"""`phi4 data reasoning`: a task whose answers can be checked, made on this machine."""

import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from phi4.data.demo.arithmetic import Writer
from phi4.data.demo.reasoning import ReasoningData, build_reasoning


def register(app: typer.Typer) -> None:
    """Add the command to `phi4 data`."""
    app.command("reasoning")(reasoning)


def reasoning(
    out: Annotated[Path, typer.Option(help="Directory to write.")] = Path("runs/reasoning/data"),
    seed: Annotated[int, typer.Option(min=0, help="Of expressions and documents.")] = 0,
    operators: Annotated[
        int, typer.Option(min=2, max=8, help="Of an expression; answers grow with their square.")
    ] = ReasoningData().num_operators,
    precedence_error: Annotated[
        float,
        typer.Option(min=0, max=1, help="How often the writer takes a sum before a product."),
    ] = Writer().precedence_error,
    scale: Annotated[
        float, typer.Option(min=0.001, help="So many times the documents and questions.")
    ] = 1.0,
) -> None:
    """Build documents and questions of arithmetic modulo 10, with a tokenizer of their own.

    `3+5+5*2=8+5*2=8+0=8` is a document. Its writer often takes a sum before a product that should
    come first, so a model of the documents knows the rule and the mistake, and which operator comes
    next often decides whether an answer is right. The questions are the beginnings of expressions
    that are in no document, with keys for the oracle `exact`: one file each for fine-tuning,
    search, judging, choosing checkpoints and testing.
    """
    start = time.monotonic()
    writer = replace(Writer(), precedence_error=precedence_error)
    data = ReasoningData(num_operators=operators, writer=writer, seed=seed)
    report = build_reasoning(out, data.scaled(scale))
    typer.echo(
        f"{report.num_documents:,} documents, {report.num_tokens:,} tokens, "
        f"{report.vocab_size} ids; an answer has {report.answer_tokens} tokens"
    )
    for name, count in report.num_questions.items():
        typer.echo(f"{name:8}{count:>6} questions")
    typer.echo(f"written to {out} in {time.monotonic() - start:.1f} s")
