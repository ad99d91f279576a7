"""`phi4 data ledger` and `phi4 data why`: what a run was fed, from its checkpoints alone."""

import ast
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from phi4.config import Recipe, parse_recipe, recipe_from_toml
from phi4.data.ledger import BlendEntry, LedgerState, parse_state
from phi4.data.loader import Loader
from phi4.data.replay import rewind, units_by_blend
from phi4.data.tokenizer import load_tokenizer
from phi4.errors import CheckpointError, ConfigError
from phi4.train.ledger_record import recorded_counts
from phi4.train.state import RECIPE_FILE, STATE_FILE, RunState

Run = Annotated[Path, typer.Argument(help="Directory of a run.")]
Step = Annotated[int, typer.Option(min=1, help="Optimizer step; the first one is 1.")]
Sample = Annotated[int, typer.Option(min=0, help="Row of the global batch; the first one is 0.")]
Show = Annotated[bool, typer.Option(help="Also print the text of the sample.")]


def register(app: typer.Typer) -> None:
    """Add the commands to `phi4 data`."""
    app.command("ledger")(ledger)
    app.command("why")(why)


def ledger(run: Run) -> None:
    """Fraction asked and drawn of every source, blend by blend, and epochs.

    A run with `data.continue_from` goes on with the ledger of another one: what was drawn before it
    is shown as such, and epochs count from the beginning of the ledger.
    """
    recipe, state = _checkpoints(run)[-1]
    book = parse_state(state.data)
    ends = [*book.blends[1:], _as_blend(book)]
    units = units_by_blend(book)
    before = sum(units) - _units_since(recipe, state, 1)
    for number, (begin, end) in enumerate(zip(book.blends, ends, strict=True), start=1):
        _print_blend(book, number, begin, end)
        if before > 0:
            drawn = min(before, units[number - 1])
            typer.echo(f"{drawn:,} units of it before this run, counted by {state.ledger_from}")
        before -= units[number - 1]
    typer.echo(f"\nstep {state.step}\n{'source':20} {'units drawn':>14} {'of':>14} {'epochs':>8}")
    for name, count in sorted(book.sources.items()):
        epochs = count.drawn / count.num_units
        typer.echo(f"{name:20} {count.drawn:>14,} {count.num_units:>14,} {epochs:>8.3f}")


def why(run: Run, step: Step, sample: Sample, show: Show = False) -> None:
    """Source, shard, document and offset behind a sample of a training step."""
    checkpoints = _checkpoints(run)
    recipe, state = checkpoints[-1]
    if step > state.step:
        raise ConfigError(f"step {step} asked; the run's newest checkpoint is of step {state.step}")
    then = recipe_at(recipe, state, step)
    if sample >= then.batch.global_batch_size:
        raise ConfigError(
            f"sample {sample} asked; step {step} had {then.batch.global_batch_size}, from 0"
        )
    tokenizer = load_tokenizer(then.tokenizer)
    earlier = [parse_state(other.data) for _, other in checkpoints[:-1] if other.step < step]
    units = _units_since(recipe, state, step)
    recorded = recorded_counts(run, step - 1)
    start, between = rewind(parse_state(state.data), units, earlier, recorded)
    loader = Loader(then.data, tokenizer.facts, then.run.seed, msgspec.to_builtins(start))
    loader.stream.skip(between)
    for line in loader.describe_row(sample):
        typer.echo(line)
    if show:
        row = loader.row(sample)
        typer.echo(f"---\n{tokenizer.decode(row.tokens[0])}")


def recipe_at(recipe: Recipe, state: RunState, step: int) -> Recipe:
    """The recipe that a step ran under.

    Args:
        recipe: of the newest checkpoint.
        state: of the same; its history is undone back to the step.
        step: from 1.
    """
    tree = recipe.model_dump(mode="json", exclude_none=True)
    for change in reversed(state.history):
        if change.step >= step:
            section, key = change.key.split(".")
            old = ast.literal_eval(change.old)
            tree[section] |= {key: old}
            if old is None:
                del tree[section][key]
    # The files lie where they lie now, wherever they lay then.
    places = {source.name: source.path for source in recipe.data.sources}
    for source in tree["data"]["sources"]:
        source["path"] = places.get(source["name"], source["path"])
    return parse_recipe(tree, where=f"the recipe of step {step}")


def _units_since(recipe: Recipe, state: RunState, step: int) -> int:
    """Units of the stream that the steps from `step` to the checkpoint took."""
    begins = sorted({step, *(c.step + 1 for c in state.history if step <= c.step < state.step)})
    units = 0
    for begin, end in zip(begins, [*begins[1:], state.step + 1], strict=True):
        then = recipe_at(recipe, state, begin)
        row_units = then.data.sequence_length // then.data.unit_tokens
        units += (end - begin) * then.batch.global_batch_size * row_units
    return units


def _checkpoints(run: Path) -> list[tuple[Recipe, RunState]]:
    """Recipe and state of each checkpoint up to the one that `latest` names, by step."""
    root = run / "checkpoints"
    try:
        newest = (root / "latest").read_text().strip()
    except OSError:
        raise CheckpointError(f"{run} holds no checkpoint; give the directory of a run") from None
    found = []
    for path in sorted(root.glob("step_*")):
        if path.name > newest:
            continue
        recipe = recipe_from_toml((path / RECIPE_FILE).read_text(), where=str(path / RECIPE_FILE))
        found.append((recipe, RunState.from_json((path / STATE_FILE).read_text())))
    if not found or found[-1][1].data is None:
        raise CheckpointError(f"{root / newest} keeps no ledger; the run has not drawn anything")
    return found


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
