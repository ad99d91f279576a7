"""`phi4 demo`: from a corpus to text on one machine, in the commands a user would type."""

import json
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from phi4.config import SourceConfig, load_recipe
from phi4.errors import Phi4Error
from phi4.rundir import require_free
from phi4.rundir.checkpoints import find_checkpoint
from phi4.rundir.names import METRICS_FILE

RECIPE = "examples/recipes/tiny_pretrain.toml"
MIDTRAIN = "examples/recipes/tiny_midtrain.toml"
DEFAULT_OUT = Path("runs/demo")
FIRST_STEPS, ALL_STEPS = 100, 140
NATS_BELOW_UNIGRAM = 0.5


def demo(
    out: Annotated[
        Path, typer.Option(help="Directory of everything the demo makes.")
    ] = DEFAULT_OUT,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Append the result as a row to this file.")
    ] = None,
) -> None:
    """Train a small Phi-4 on this machine, from corpus to text.

    Builds a corpus from this Python's standard library, trains on four processes (tensor 2 x
    pipeline 2), resumes with context 2, midtrains, generates text and compares three layouts with
    one process. Each step is a `phi4` command that is printed first; the exit code is that of the
    first one that fails.
    """
    started = time.monotonic()
    data, run, midtrain = out / "data", out / "run", out / "midtrain"
    for earlier in (run, midtrain):
        require_free(earlier, say=typer.echo)
    for earlier in (run, midtrain):
        if earlier.exists():
            typer.echo(f"removing the run of an earlier demo in {earlier}")
            shutil.rmtree(earlier)
    train = ["train", RECIPE, *_recipe_overrides(RECIPE, out)]
    _phi4("The corpus: sources and documentation of this Python.", "data", "demo", "--out", data)
    _phi4(
        "Tensor 2 x pipeline 2 with sequence parallelism: four processes.",
        *train,
        f"run.steps={FIRST_STEPS}",
    )
    _phi4(
        "The same run goes on in another layout: context 2.",
        *train,
        f"run.steps={ALL_STEPS}",
        "--change",
        *("parallel.tensor=1", "parallel.pipeline=1", "parallel.sequence=false"),
        "parallel.context=2",
    )
    _phi4(
        "Midtraining: rows four times as long, 30% long documents, 70% recall that goes on in the "
        "data where pretraining left them.",
        *("train", MIDTRAIN, *_recipe_overrides(MIDTRAIN, out)),
    )
    _phi4("What it has been fed.", "data", "ledger", midtrain)
    _phi4(
        "What it writes.",
        "generate",
        midtrain,
        "def ",
        "--max-tokens",
        60,
        "--temperature",
        0.7,
    )
    _phi4(
        "Three layouts against one process.",
        *("verify", "parity", RECIPE, "--steps", 3, "--layouts", "tp2+sp,pp2,tp2xcp2+sp"),
    )
    picture = _draw(run)
    seconds = time.monotonic() - started
    gain = _conclude(data, run, picture, seconds)
    if json_file:
        from phi4.verify.measured_rows import append_row

        steps = {"steps": ALL_STEPS, "held_out_nats_below_unigram": round(gain, 3)}
        append_row(json_file, {"benchmark": "demo", "seconds": round(seconds), **steps})


def _phi4(why: str, *words: object) -> None:
    command = [str(word) for word in words]
    typer.secho(f"\n{why}\n$ phi4 {shlex.join(command)}", bold=True)
    code = subprocess.run([sys.executable, "-m", "phi4", *command], check=False).returncode
    if code:
        raise typer.Exit(code)


def _recipe_overrides(path: str, out: Path) -> Sequence[str]:
    """Overrides only where the demo does not run in its usual place."""
    if out == DEFAULT_OUT:
        return []
    recipe = load_recipe(path)
    overrides = [
        f"run.dir={_moved(recipe.run.dir, out)}",
        f"tokenizer.path={_moved(recipe.tokenizer.path, out)}",
        f"data.sources={_moved_sources(recipe.data.sources, out)}",
        f"data.held_out={_moved_sources(recipe.data.held_out, out)}",
    ]
    before = {
        "run.init_from": recipe.run.init_from,
        "data.continue_from": recipe.data.continue_from,
    }
    return overrides + [f"{key}={_moved(run, out)}" for key, run in before.items() if run]


def _moved_sources(sources: Sequence[SourceConfig], out: Path) -> str:
    """The sources as a TOML list."""
    entries = []
    for source in sources:
        keys = source.model_dump(exclude_unset=True) | {"path": str(_moved(source.path, out))}
        entries.append(", ".join(f"{key} = {json.dumps(value)}" for key, value in keys.items()))
    return "[" + ", ".join(f"{{ {entry} }}" for entry in entries) + "]"


def _moved(path: str, out: Path) -> Path:
    return out / Path(path).relative_to(DEFAULT_OUT)


def _draw(run: Path) -> Path:
    from phi4.track import draw_losses

    return draw_losses(run / METRICS_FILE, run / "loss.png")


def _conclude(data: Path, run: Path, picture: Path, seconds: float) -> float:
    from phi4.rundir.step_log import read_metrics

    unigram = json.loads((data / "corpus.json").read_text())["unigram_entropy_nats"]
    held_out = [
        m["held_out_loss"] for m in read_metrics(run / METRICS_FILE) if "held_out_loss" in m
    ]
    gain = unigram - held_out[-1]
    typer.secho(f"\nDone in {seconds:.0f} s.", bold=True)
    typer.echo(
        f"held-out loss {held_out[-1]:.3f}, {gain:.3f} nats below the unigram entropy "
        f"{unigram:.3f} of the training tokens"
    )
    typer.echo(f"metrics     {run / METRICS_FILE}")
    typer.echo(f"loss curve  {picture}")
    typer.echo(f"checkpoint  {find_checkpoint(run)}")
    typer.echo(f"MLflow      mlflow ui --backend-store-uri sqlite:///{run.parent / 'mlflow.db'}")
    if gain < NATS_BELOW_UNIGRAM:
        raise Phi4Error(
            f"the demo's held-out loss is only {gain:.3f} nats below the unigram entropy, expected "
            f"at least {NATS_BELOW_UNIGRAM}; something is wrong with this installation"
        )
    return gain
