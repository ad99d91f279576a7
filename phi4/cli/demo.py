"""`phi4 demo`: from a corpus to text on one machine, in the commands a user would type."""

import json
import shutil
import time
from pathlib import Path
from typing import Annotated

import typer

from phi4.cli.demo_commands import NumberedCommands, moved_recipe, run_phi4
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
NUM_SECTIONS = 7
NATS_BELOW_UNIGRAM = 0.5


def demo(
    out: Annotated[
        Path | None,
        typer.Option(
            help=f"Output directory; by default {DEFAULT_OUT}, or {USUAL_OUT} with "
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
            help="Run the post-training demo instead: a small reasoning model, from pretraining "
            "to two rounds of DPO. Resumes where it was stopped.",
        ),
    ] = False,
    seed: Annotated[
        int, typer.Option(min=0, help="Seed of data, sampling and training; with --post-training.")
    ] = 0,
) -> None:
    """Train a small Phi-4 on this machine, from corpus to text.

    Builds a corpus from this Python's standard library, trains on four processes (tensor 2 x
    pipeline 2), resumes with context 2, midtrains, generates text and compares three layouts with
    one process. Each of the seven sections is a `phi4` command, which is printed before it runs.
    The demo ends with the exit code of the first command that fails.

    --post-training runs another model on another task, arithmetic modulo 10: pretraining,
    fine-tuning on the best of its own answers, pivotal token search, DPO on pivotal tokens and DPO
    on full answers. The accuracy on held-out problems is printed after every stage and in a table
    at the end.
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
            typer.echo(f"removing {earlier}, the run of an earlier demo")
            shutil.rmtree(earlier)
    train = ["train", RECIPE, *moved_recipe(RECIPE, out, DEFAULT_OUT)]
    section = NumberedCommands(run_phi4, NUM_SECTIONS)
    section(
        "Corpus: sources and documentation of this Python",
        *("data", "demo", "--out", data),
    )
    section(
        "Pretraining: tensor 2 x pipeline 2 with sequence parallelism, four processes",
        *train,
        f"run.steps={FIRST_STEPS}",
    )
    section(
        "Resume: the same run in another layout, context 2",
        *train,
        f"run.steps={ALL_STEPS}",
        "--change",
        *("parallel.tensor=1", "parallel.pipeline=1", "parallel.sequence=false"),
        "parallel.context=2",
    )
    section(
        "Midtraining: rows four times as long, 30% long documents, 70% pretraining data from where "
        "pretraining stopped",
        *("train", MIDTRAIN, *moved_recipe(MIDTRAIN, out, DEFAULT_OUT)),
    )
    section("Ledger: what was drawn from each source", "data", "ledger", midtrain)
    section(
        "Generation",
        "generate",
        midtrain,
        "def ",
        "--max-tokens",
        60,
        "--temperature",
        0.7,
    )
    section(
        "Parity: three layouts against one process",
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
