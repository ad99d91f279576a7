"""`phi4 pts select`: the checkpoint of a run with the best accuracy on held-out questions."""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from phi4.cli.answers import Drawing, OracleName, Overrides, Questions, scored
from phi4.cli.sampling_options import (
    CacheTokens,
    IsUserTurn,
    MaxTokens,
    SamplingOptions,
    Seed,
    Temperature,
)
from phi4.config import load_recipe
from phi4.errors import CheckpointError
from phi4.oracles.registry import open_oracle
from phi4.pts.score import Estimate
from phi4.pts.select_checkpoint import (
    Candidate,
    CandidateRow,
    Selection,
    best_of,
    compare,
    write_selection,
)
from phi4.rundir.checkpoints import checkpoints_dir, complete_checkpoints, find_checkpoint
from phi4.rundir.names import CONFIG_FILE, SELECTED_FILE, SELECTION_DIR

START = "start"


def register(app: typer.Typer) -> None:
    """Add the command to `phi4 pts`."""
    app.command("select")(select)


def select(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run directory (run.dir).")],
    questions: Questions,
    oracle: OracleName,
    overrides: Overrides = None,
    n: Annotated[int, typer.Option("--n", min=1, help="Answers per question.")] = 8,
    chat: IsUserTurn = True,
    max_tokens: MaxTokens = 512,
    temperature: Temperature = 1.0,
    seed: Seed = 0,
    cache_tokens: CacheTokens = None,
) -> None:
    """Sample answers of every kept checkpoint of a run and of the model that it started from.

    The accuracy of each is printed, with its gain over the start, ± standard error.
    RUN/selected.json holds these numbers and the best checkpoint, whose path is the last line: use
    it as run.init_from of the next stage. Use questions that are not in the training data, and keep
    other questions for the final evaluation: the best of several checkpoints is biased upwards.
    """
    # An unknown oracle is an error before anything is sampled.
    open_oracle(oracle).close()
    options = SamplingOptions(max_tokens, temperature, 1.0, 0, 0.0, seed, ())
    places = dict(_candidates(run))
    drawing = Drawing(questions, n, chat, options, overrides or (), None, cache_tokens)
    answers = {name: run / SELECTION_DIR / f"{name}.jsonl" for name in places}
    for name, checkpoint in places.items():
        if code := drawing.draw(str(checkpoint), answers[name]):
            raise typer.Exit(code)
    rows = compare([Candidate(k, places[k], scored(answers[k], oracle)) for k in places])
    best = best_of(rows)
    write_selection(
        run / SELECTED_FILE,
        Selection(
            checkpoint=best.checkpoint,
            questions=str(questions),
            oracle=oracle,
            n=n,
            candidates=rows,
        ),
    )
    typer.echo("\n".join(_table(rows, best)))
    typer.echo(best.checkpoint)


def _candidates(run: Path) -> Iterator[tuple[str, Path]]:
    """Name and directory of the start, where the run has one, and of every checkpoint."""
    checkpoints = complete_checkpoints(checkpoints_dir(run))
    if not checkpoints:
        raise CheckpointError(f"no checkpoint in {run}; give the directory of a run that has some")
    recipe = load_recipe(run / CONFIG_FILE)
    if recipe.run.init_from is not None:
        yield START, find_checkpoint(Path(recipe.run.init_from))
    for one in checkpoints:
        yield one.name, one


def _table(rows: tuple[CandidateRow, ...], best: CandidateRow) -> Iterator[str]:
    yield f"{'':14}{'right':16}gain"
    for row in rows:
        accuracy = Estimate(row.accuracy, row.standard_error, 0)
        compared = Estimate(row.gain, row.gain_standard_error, 0)
        mark = "  best" if row is best else ""
        yield f"{row.name:14}{accuracy!s:16}{compared!s:16}{mark}".rstrip()
