"""`phi4 convert`: checkpoints out to Hugging Face's format and in from it."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from phi4.cli.file_errors import FileErrorsGroup
from phi4.launch import WorkerEnvironment, join, on_ranks

app = typer.Typer(cls=FileErrorsGroup, no_args_is_help=True)

Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="section.key=value, for example tokenizer.path=bpe.tiktoken."),
]

Upload = Annotated[
    bool, typer.Option("--upload", help="Also upload the weights as artifacts of the run.")
]


@app.command()
def to_hf(
    checkpoint: Annotated[
        Path,
        typer.Argument(
            help="A step_NNNNNNN directory, or a run directory (its latest checkpoint)."
        ),
    ],
    out: Annotated[Path, typer.Argument(help="Directory to create.")],
    overrides: Overrides = None,
    dtype: Annotated[
        Literal["fp32", "bf16"] | None,
        typer.Option(help="Dtype of the stored weights; by default the checkpoint's."),
    ] = None,
    register: Annotated[
        str | None,
        typer.Option(
            help="Register the export as a version of this model in the MLflow store of its run."
        ),
    ] = None,
    upload: Upload = False,
) -> None:
    """Write a checkpoint of any layout as a directory that transformers can open.

    --register NAME also makes it a version of that model in MLflow, as `phi4 convert register`
    does.
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
        Path,
        typer.Argument(
            help="A step_NNNNNNN directory, or a run directory (its latest checkpoint)."
        ),
    ],
    hf_dir: Annotated[
        Path, typer.Argument(help="Directory that `phi4 convert to-hf` wrote from it.")
    ],
    name: Annotated[str, typer.Argument(help="Name of the registered model; created if needed.")],
    tracking_uri: Annotated[
        str | None,
        typer.Option(
            help="Address of the run's store; needed only if the recorded one lacks a password."
        ),
    ] = None,
    upload: Upload = False,
) -> None:
    """Register an export as a version of a model, in the MLflow store of its run.

    The version names the run, the checkpoint's step and the hash of its manifest. Without --upload
    the weights are not copied: a local store gets the directory as the version's source; a server,
    which accepts no path of another machine, gets the small files and one that names the location
    of the rest.
    """
    from phi4.rundir.checkpoints import find_checkpoint

    _register(find_checkpoint(checkpoint), hf_dir, name, tracking_uri, upload)


def _register(checkpoint: Path, hf_dir: Path, name: str, uri: str | None, upload: bool) -> None:
    from phi4.track.mlflow.models import ExportedModel, register_export

    exported = ExportedModel.of(hf_dir, checkpoint)
    register_export(exported, name, uri=uri, upload=upload, say=typer.echo)


@app.command()
def from_hf(
    hf_dir: Annotated[Path, typer.Argument(help="Directory with config.json and safetensors.")],
    checkpoint: Annotated[Path, typer.Argument(help="Directory to create; gets step_0000000.")],
    overrides: Overrides = None,
) -> None:
    """Convert a Hugging Face directory of Phi-3 architecture to a checkpoint for a run.

    Its recipe comes from config.json; data.sequence_length is min(4096, max_position_embeddings).
    """

    def body(worker: WorkerEnvironment) -> None:
        from phi4.convert.checkpoint import import_hf
        from phi4.engine.platform import disconnect

        platform = join(worker, "cpu", threads=1)
        written = import_hf(hf_dir, checkpoint, platform, overrides=overrides or [])
        disconnect()
        typer.echo(f"wrote {written} from {hf_dir}")

    raise typer.Exit(on_ranks([], body, num_workers=1, work_dir=Path()))
