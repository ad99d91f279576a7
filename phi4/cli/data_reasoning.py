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
    out: Annotated[Path, typer.Option(help="Output directory.")] = Path("runs/reasoning/data"),
    seed: Annotated[int, typer.Option(min=0, help="Seed of expressions and documents.")] = 0,
    operators: Annotated[
        int,
        typer.Option(
            min=2, max=8, help="Operators per expression; answer length grows with the square."
        ),
    ] = ReasoningData().num_operators,
    precedence_error: Annotated[
        float,
        typer.Option(
            min=0, max=1, help="Probability that the writer computes a sum before a product."
        ),
    ] = Writer().precedence_error,
    scale: Annotated[
        float,
        typer.Option(min=0.001, help="Scale factor of the number of documents and questions."),
    ] = 1.0,
) -> None:
    """Build documents and questions of arithmetic modulo 10, with their own tokenizer.

    `3+5+5*2=8+5*2=8+0=8` is a document. The simulated writer often computes a sum before a product,
    so a model of the documents learns both the rule and the mistake, and the next operator often
    decides whether an answer is correct. The questions are beginnings of expressions that occur in
    no document, with reference answers for the oracle `exact`: one file each for fine-tuning,
    search, judging, checkpoint selection and testing.
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
