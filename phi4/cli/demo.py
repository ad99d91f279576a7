"""`phi4 demo`: from a corpus to text on one machine, in the commands a user would type."""

import json
import shutil
import time
from pathlib import Path
from typing import Annotated

import typer

from phi4.cli.demo_commands import moved_recipe, run_phi4
from phi4.cli.demo_figures import post_train
from phi4.cli.demo_post_training import USUAL_OUT, ChainSettings
from phi4.errors import ConfigError, Phi4Error
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
        Path | None,
        typer.Option(
            help=f"Directory of everything the demo makes; {DEFAULT_OUT}, or {USUAL_OUT} with "
            "--post-training.",
            show_default=False,
        ),
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Append the result as a row to this file.")
    ] = None,
    post_training: Annotated[
        bool,
        typer.Option(
            "--post-training",
            help="Instead: a small model that reasons, from pretraining to two rounds of "
            "preferences; goes on where it was stopped.",
        ),
    ] = False,
    seed: Annotated[
        int, typer.Option(min=0, help="With --post-training: of data, draws and training.")
    ] = 0,
) -> None:
    """Train a small Phi-4 on this machine, from corpus to text.

    Builds a corpus from this Python's standard library, trains on four processes (tensor 2 x
    pipeline 2), resumes with context 2, midtrains, generates text and compares three layouts with
    one process. Each step is a `phi4` command that is printed first; the exit code is that of the
    first one that fails.

    With --post-training it is another model on another task, arithmetic modulo 10: pretraining,
    fine-tuning on the best of its own answers, search for the tokens that decide whether an answer
    is right, preferences of these, and preferences of whole answers. After every stage it says how
    many held-out problems are answered right, and at the end it shows a table.
    """
    if post_training:
        post_train(ChainSettings(out=out or USUAL_OUT, seed=seed), json_file)
        return
    if seed:
        raise ConfigError("--seed has no effect without --post-training; leave it out")
    _pretrain(out or DEFAULT_OUT, json_file)


def _pretrain(out: Path, json_file: Path | None) -> None:
    """Everything but post-training."""
    started = time.monotonic()
    data, run, midtrain = out / "data", out / "run", out / "midtrain"
    for earlier in (run, midtrain):
        require_free(earlier, say=typer.echo)
    for earlier in (run, midtrain):
        if earlier.exists():
            typer.echo(f"removing the run of an earlier demo in {earlier}")
            shutil.rmtree(earlier)
    train = ["train", RECIPE, *moved_recipe(RECIPE, out, DEFAULT_OUT)]
    run_phi4("The corpus: sources and documentation of this Python.", "data", "demo", "--out", data)
    run_phi4(
        "Tensor 2 x pipeline 2 with sequence parallelism: four processes.",
        *train,
        f"run.steps={FIRST_STEPS}",
    )
    run_phi4(
        "The same run goes on in another layout: context 2.",
        *train,
        f"run.steps={ALL_STEPS}",
        "--change",
        *("parallel.tensor=1", "parallel.pipeline=1", "parallel.sequence=false"),
        "parallel.context=2",
    )
    run_phi4(
        "Midtraining: rows four times as long, 30% long documents, 70% recall that goes on in the "
        "data where pretraining left them.",
        *("train", MIDTRAIN, *moved_recipe(MIDTRAIN, out, DEFAULT_OUT)),
    )
    run_phi4("What it has been fed.", "data", "ledger", midtrain)
    run_phi4(
        "What it writes.",
        "generate",
        midtrain,
        "def ",
        "--max-tokens",
        60,
        "--temperature",
        0.7,
    )
    run_phi4(
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
