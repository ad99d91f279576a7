"""`phi4 data ledger` and `phi4 data trace`: the data of a run, read from its checkpoints alone."""

from pathlib import Path
from typing import Annotated

import msgspec
import typer

from phi4.data.stream.ledger import BlendEntry, LedgerState, parse_state
from phi4.data.stream.loader import Loader
from phi4.data.stream.replay import rewind, units_by_blend
from phi4.data.vocabulary.tokenizer import load_tokenizer
from phi4.errors import ConfigError
from phi4.rundir.history import read_history
from phi4.rundir.ledger_log import recorded_counts

Run = Annotated[Path, typer.Argument(help="Run directory.")]
Step = Annotated[int, typer.Option(min=1, help="Optimizer step, from 1.")]
Sample = Annotated[int, typer.Option(min=0, help="Row of the global batch, from 0.")]
Show = Annotated[bool, typer.Option(help="Also print the text of the sample.")]


def register(app: typer.Typer) -> None:
    """Add the commands to `phi4 data`."""
    app.command("ledger")(ledger)
    app.command("trace")(trace)


def ledger(run: Run) -> None:
    """Show the requested and the drawn fraction of every source for each blend, and epochs.

    A run with `data.continue_from` continues the ledger of another run. What the other run drew is
    shown separately, and epochs count from the start of the ledger.
    """
    history = read_history(run)
    state = history.state
    book = parse_state(state.data or {})
    ends = [*book.blends[1:], _as_blend(book)]
    units = units_by_blend(book)
    before = sum(units) - history.units_since(1)
    for number, (begin, end) in enumerate(zip(book.blends, ends, strict=True), start=1):
        _print_blend(book, number, begin, end)
        if before > 0:
            drawn = min(before, units[number - 1])
            typer.echo(f"{drawn:,} units of it before this run, counted by {state.ledger_from}")
        before -= units[number - 1]
    for skip in state.skips:
        undone = f"steps {skip.after_step + 1} to {skip.last_undone} were rolled back"
        why = skip.reason
        if skip.last_undone > skip.after_step:
            why = f"{undone} ({skip.reason})"
        typer.echo(
            f"\nskipped {skip.units:,} units ({skip.rows:,} rows) after step {skip.after_step}: "
            f"{why}"
        )
    typer.echo(f"\nstep {state.step}\n{'source':20} {'units drawn':>14} {'of':>14} {'epochs':>8}")
    for name, count in sorted(book.sources.items()):
        epochs = count.drawn / count.num_units
        typer.echo(f"{name:20} {count.drawn:>14,} {count.num_units:>14,} {epochs:>8.3f}")


def trace(run: Run, step: Step, sample: Sample, show: Show = False) -> None:
    """Trace a sample of a training step to its source, shard, document and offset."""
    history = read_history(run)
    state = history.state
    if step > state.step:
        raise ConfigError(
            f"--step={step} is after the run's newest checkpoint, of step {state.step}; choose an "
            "earlier one"
        )
    then = history.recipe_at(step)
    if sample >= then.batch.global_batch_size:
        raise ConfigError(
            f"--sample={sample}, but step {step} has {then.batch.global_batch_size} rows, from 0"
        )
    tokenizer = load_tokenizer(then.tokenizer)
    earlier = [parse_state(old.data) for old in history.earlier if old.data and old.step < step]
    units = history.units_since(step)
    recorded = recorded_counts(run, step - 1)
    start, between = rewind(parse_state(state.data or {}), units, earlier, recorded)
    loader = Loader(then.data, tokenizer.facts, then.run.seed, msgspec.to_builtins(start))
    loader.stream.skip(between)
    for line in loader.describe_row(sample):
        typer.echo(line)
    if show:
        row = loader.row(sample)
        typer.echo(f"---\n{tokenizer.decode(row.tokens[0])}")


def _as_blend(book: LedgerState) -> BlendEntry:
    """The counts of now, as if another blend began."""
    drawn = {name: count.drawn for name, count in book.sources.items()}
    loss = {name: count.loss_tokens for name, count in book.sources.items()}
    return BlendEntry(weights={}, drawn=drawn, loss_tokens=loss)


def _print_blend(book: LedgerState, number: int, begin: BlendEntry, end: BlendEntry) -> None:
    if begin.weigh_by == "units":
        sizes = {
            name: (end.drawn.get(name, 0) - begin.drawn.get(name, 0))
            * (begin.draw_units if book.sources[name].whole_rows else 1)
            for name in begin.weights
        }
    else:
        before, after = begin.loss_tokens, end.loss_tokens
        sizes = {name: after.get(name, 0) - before.get(name, 0) for name in begin.weights}
    what = begin.weigh_by.replace("_", " ")
    total, weights = sum(sizes.values()), sum(begin.weights.values())
    typer.echo(f"blend {number}: {total:,} {what} drawn\n{'source':20} {'asked':>9} {'drawn':>9}")
    for name, weight in sorted(begin.weights.items()):
        share = sizes[name] / total if total else 0.0
        typer.echo(f"{name:20} {weight / weights:>9.4%} {share:>9.4%} {sizes[name]:>16,} {what}")
