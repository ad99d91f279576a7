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
) -> None:
    """Write a checkpoint of any layout as a directory that transformers opens."""

    def body(worker: WorkerEnvironment) -> None:
        from phi4.convert.checkpoint import export_checkpoint
        from phi4.engine.platform import disconnect
        from phi4.rundir.checkpoints import find_checkpoint

        found = find_checkpoint(checkpoint)
        platform = join(worker, "cpu", threads=1)
        export_checkpoint(found, out, platform, dtype=dtype, overrides=overrides or [])
        disconnect()
        typer.echo(f"wrote {out} from {found}")

    raise typer.Exit(on_ranks([], body, num_workers=1, work_dir=Path()))


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
