"""`phi4 convert`: checkpoints out to Hugging Face's format and in from it."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from phi4.launch import WorkerEnvironment, join, on_ranks

app = typer.Typer(help="Hugging Face checkpoints in and out.", no_args_is_help=True)

Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="section.key=value, for example tokenizer.path=bpe.tiktoken."),
]

Upload = Annotated[
    bool, typer.Option("--upload", help="Send the weights to MLflow too, as artifacts of the run.")
]


@app.command()
def to_hf(
    checkpoint: Annotated[
        Path, typer.Argument(help="A step_NNNNNNN directory, or a run whose latest is meant.")
    ],
    out: Annotated[Path, typer.Argument(help="A new directory.")],
    overrides: Overrides = None,
    dtype: Annotated[
        Literal["fp32", "bf16"] | None,
        typer.Option(help="Of the stored weights; the checkpoint's own when left out."),
    ] = None,
    register: Annotated[
        str | None,
        typer.Option(
            help="Make it a version of this registered model, where MLflow shows its run."
        ),
    ] = None,
    upload: Upload = False,
) -> None:
    """Write a checkpoint of any layout as a directory that transformers opens.

    With --register NAME it becomes a version of that model in MLflow: `phi4 convert register`.
    """

    def body(worker: WorkerEnvironment) -> None:
        from phi4.convert.checkpoint import export_checkpoint
        from phi4.engine.platform import disconnect
        from phi4.rundir.checkpoints import find_checkpoint

        found = find_checkpoint(checkpoint)
        if register is not None:
            from phi4.track.mlflow.models import require_shown

            # Before the minutes that an export takes.
            require_shown(found)
        platform = join(worker, "cpu", threads=1)
        export_checkpoint(found, out, platform, dtype=dtype, overrides=overrides or [])
        disconnect()
        typer.echo(f"wrote {out} from {found}")
        if register is not None:
            _register(found, out, register, None, upload)

    raise typer.Exit(on_ranks([], body, num_workers=1, work_dir=Path()))


@app.command()
def register(
    checkpoint: Annotated[
        Path, typer.Argument(help="A step_NNNNNNN directory, or a run whose latest is meant.")
    ],
    hf_dir: Annotated[Path, typer.Argument(help="What to-hf wrote from it.")],
    name: Annotated[str, typer.Argument(help="Of the registered model; made where there is none.")],
    tracking_uri: Annotated[
        str | None,
        typer.Option(help="Address of the run's store, where it needs a password; else known."),
    ] = None,
    upload: Upload = False,
) -> None:
    """Make an export a version of a registered model, in the MLflow store that shows its run.

    The version names the run, the checkpoint's step and the hash of its manifest. Weights stay
    where they are, unless --upload: a local store takes the directory as the version's source; a
    server, which takes no path of another machine, gets the small files and one that says where the
    rest is.
    """
    from phi4.rundir.checkpoints import find_checkpoint

    _register(find_checkpoint(checkpoint), hf_dir, name, tracking_uri, upload)


def _register(checkpoint: Path, hf_dir: Path, name: str, uri: str | None, upload: bool) -> None:
    from phi4.track.mlflow.models import ExportedModel, register_export

    exported = ExportedModel.of(hf_dir, checkpoint)
    register_export(exported, name, uri=uri, upload=upload, say=typer.echo)


@app.command()
def from_hf(
    hf_dir: Annotated[Path, typer.Argument(help="Holds config.json and safetensors.")],
    checkpoint: Annotated[Path, typer.Argument(help="A new directory; gets step_0000000.")],
    overrides: Overrides = None,
) -> None:
    """Write a Phi3-shape directory as a checkpoint that a run can start from.

    Its recipe comes from config.json; data.sequence_length is 4096 or what the model can.
    """

    def body(worker: WorkerEnvironment) -> None:
        from phi4.convert.checkpoint import import_hf
        from phi4.engine.platform import disconnect

        platform = join(worker, "cpu", threads=1)
        written = import_hf(hf_dir, checkpoint, platform, overrides=overrides or [])
        disconnect()
        typer.echo(f"wrote {written} from {hf_dir}")

    raise typer.Exit(on_ranks([], body, num_workers=1, work_dir=Path()))
