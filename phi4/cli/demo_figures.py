"""The figures of stages of post-training, as a table and as a picture of it.

The form is that of the report's Table 9: a column for each stage, a row for what is measured.
"""

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import typer

from phi4.cli.demo_commands import run_phi4
from phi4.cli.demo_post_training import ChainSettings, StageFigures, gains, run_chain
from phi4.pts.score import Estimate
from phi4.track import Bars, draw_bars

_WIDTH = 16
_TITLE = "share of right answers to held-out problems"


def post_train(settings: ChainSettings, json_file: Path | None) -> None:
    """Run all stages, show their figures, and say how to talk with the model.

    Args:
        settings: of the chain.
        json_file: gets the figures as a row; None for none.
    """
    started = time.monotonic()
    figures = run_chain(settings)
    seconds = time.monotonic() - started
    typer.secho(f"\nDone in {seconds:.0f} s.", bold=True)
    typer.echo("\n".join(table(figures)))
    typer.echo(f"picture     {picture(figures, settings.out / 'stages.png')}")
    typer.echo(f"model       {figures[-1].model}")
    typer.echo(f"talk to it  phi4 chat {figures[-1].model}    (for example 3+5+5*2=, then /reset)")
    if json_file:
        from phi4.verify.measured_rows import append_row

        about = {"benchmark": "demo_post_training", "seconds": round(seconds)}
        append_row(json_file, about | figures_row(settings, figures))
    if sys.stdin.isatty() and sys.stdout.isatty():
        run_phi4("Ask it something; /exit ends.", "chat", figures[-1].model)


def figures_row(settings: ChainSettings, figures: Sequence[StageFigures]) -> dict[str, object]:
    """The figures as a JSON object."""
    return {
        "seed": settings.seed,
        "operators": settings.num_operators,
        "precedence_error": settings.precedence_error,
        "stages": {
            one.name: {
                "sampled": vars(one.sampled.accuracy),
                "greedy": vars(one.greedy.accuracy),
            }
            for one in figures
        },
        "gains": {name: vars(one) for name, one in gains(figures).items()},
    }


def rows_of(figures: Sequence[StageFigures]) -> Mapping[str, Sequence[Estimate]]:
    """What is measured, for every stage."""
    return {
        "sampled": [one.sampled.accuracy for one in figures],
        "greedy": [one.greedy.accuracy for one in figures],
    }


def table(figures: Sequence[StageFigures]) -> Iterator[str]:
    """The lines of the table, and the gains below it."""
    yield f"{_TITLE} ± standard error"
    yield "".join([f"{'':10}", *(f"{one.name:{_WIDTH}}" for one in figures)]).rstrip()
    for name, estimates in rows_of(figures).items():
        yield "".join([f"{name:10}", *(f"{one!s:{_WIDTH}}" for one in estimates)]).rstrip()
    compared = gains(figures)
    any_gain = next(iter(compared.values()))
    yield f"sampled answers against the stage before, over {any_gain.num_questions} problems:"
    for name, one in compared.items():
        yield f"{name:10}{one.mean:+.3f} ± {one.standard_error or 0:.3f}{_in_errors(one)}"


def picture(figures: Sequence[StageFigures], out: Path) -> Path:
    """Draw the table; returns `out` (PNG)."""
    groups = [one.name for one in figures]
    bars = [
        Bars(
            name,
            [one.mean for one in estimates],
            [one.standard_error or 0.0 for one in estimates],
        )
        for name, estimates in rows_of(figures).items()
    ]
    return draw_bars(groups, bars, _TITLE, out)


def _in_errors(compared: Estimate) -> str:
    if not compared.standard_error:
        return ""
    return f", {compared.mean / compared.standard_error:.1f} standard errors"
