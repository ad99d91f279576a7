"""`phi4 data pairs`: preference rows into token files of pairs or pivots."""

import time
from collections import Counter
from pathlib import Path
from typing import Annotated

import typer

from phi4.cli.data_options import MaxRejected, Ranks, echo_skipped, tokenizer_of
from phi4.data.files.inputs import find_inputs
from phi4.data.files.rejections import rejected_path
from phi4.data.preference.write import WrittenPreferences, write_preferences

_SHOWN_REASONS = 8


def register(app: typer.Typer) -> None:
    """Add the command to `phi4 data`."""
    app.command("pairs")(pairs_command)


def pairs_command(
    inputs: Annotated[
        list[Path],
        typer.Argument(help="jsonl, ndjson, json (.gz, .bz2, .zst), parquet, directories of them."),
    ],
    out: Annotated[str, typer.Option(help="Prefix of the .bin/.idx pair to write.")],
    ranks: Ranks = None,
    row_tokens: Annotated[
        int,
        typer.Option(min=1, help="data.sequence_length of the recipe; longer pairs are dropped."),
    ] = 16384,
    max_rejected: MaxRejected = 1000,
    overwrite: Annotated[bool, typer.Option(help="Replace existing files.")] = False,
) -> None:
    """Write preference pairs as a Megatron .bin/.idx pair with a manifest, for the stage dpo.

    Rows hold `prompt`, `chosen` and `rejected` (strings or messages), `context` and `completions`,
    `prompt_ids`, `chosen_ids` and `rejected_ids`, or pivots: `prompt_ids`, `chosen_id` and
    `rejected_id`, or `ids` and `pivots`. Rejected rows go to PREFIX.rejected.jsonl with the reason.
    """
    start = time.monotonic()
    found = find_inputs(inputs)
    echo_skipped(found.skipped)
    written = write_preferences(
        found,
        out,
        tokenizer_of(ranks),
        row_tokens=row_tokens,
        max_rejected=max_rejected,
        overwrite=overwrite,
    )
    _echo_written(out, written, time.monotonic() - start)


def _echo_written(prefix: str, written: WrittenPreferences, seconds: float) -> None:
    manifest = written.manifest
    trajectories = "" if manifest.kind == "pairs" else f" of {manifest.num_documents} trajectories"
    typer.echo(
        f"{prefix}: {written.num_preferences} {manifest.kind}{trajectories} from "
        f"{written.num_rows} rows, {manifest.num_rejected} rows left out, in {seconds:.1f} s"
    )
    typer.echo(
        f"labels per {manifest.kind.removesuffix('s') if not trajectories else 'trajectory'}: mean "
        f"{written.mean_labels:.1f}, longest {written.max_labels}"
    )
    _echo_reasons(prefix, written.reasons)


def _echo_reasons(prefix: str, reasons: Counter[str]) -> None:
    for reason, count in reasons.most_common(_SHOWN_REASONS):
        typer.echo(f"{count:>9}  {reason}")
    if more := sum(sorted(reasons.values())[:-_SHOWN_REASONS]):
        typer.echo(f"{more:>9}  for other reasons")
    if reasons:
        typer.echo(f"every row left out: {rejected_path(prefix)}")
