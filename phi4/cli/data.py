"""`phi4 data`: token files in, out and looked at."""

import os
import time
from pathlib import Path
from typing import Annotated

import typer

from phi4.cli import (
    data_best_of,
    data_inspect,
    data_ledger,
    data_pairs,
    data_quality,
    data_reasoning,
)
from phi4.cli.data_options import (
    MaxRejected,
    Pairs,
    Ranks,
    echo_skipped,
    tokenizer_config,
    tokenizer_of,
)
from phi4.cli.file_errors import FileErrorsGroup
from phi4.data.demo.corpus import build_demo
from phi4.data.files.adopt import adopt as adopt_pair
from phi4.data.files.inputs import find_inputs
from phi4.data.files.manifest import manifest_path
from phi4.data.files.token_file import TokenFile
from phi4.data.stream.sources import shard_prefixes
from phi4.data.tokenize.job import TokenizeProgress, tokenize_parts
from phi4.data.tokenize.merge import merge_runs
from phi4.data.tokenize.parts import is_finished
from phi4.data.tokenize.plan import make_plan
from phi4.data.vocabulary.bpe import SMALLEST_VOCAB
from phi4.data.vocabulary.tokenizer import load_tokenizer
from phi4.errors import ConfigError, DataError

app = typer.Typer(cls=FileErrorsGroup, no_args_is_help=True)
data_best_of.register(app)
data_inspect.register(app)
data_ledger.register(app)
data_pairs.register(app)
data_quality.register(app)
data_reasoning.register(app)

Prefix = Annotated[str, typer.Argument(help="Path of a .bin/.idx pair without the suffix.")]


def available_cpus() -> int:
    """CPUs that this process may use; a job step may have few of a node's."""
    return len(os.sched_getaffinity(0))


@app.command()
def demo(
    out: Annotated[str, typer.Option(help="Output directory.")] = "runs/demo/data",
    vocab_size: Annotated[
        int, typer.Option(min=SMALLEST_VOCAB, help="Vocabulary size, special tokens included.")
    ] = 2048,
) -> None:
    """Build the demo corpus and its tokenizer from this Python's standard library."""
    start = time.monotonic()
    # Reading and training take a minute; a directory that cannot be written is an error at once.
    Path(out).mkdir(parents=True, exist_ok=True)
    report = build_demo(out, vocab_size)
    for name, source in report.sources.items():
        typer.echo(f"{name:16} {source.num_documents:>6} documents {source.num_tokens:>10} tokens")
    typer.echo(
        f"{report.vocab_size} ids, unigram entropy of the training tokens "
        f"{report.unigram_entropy_nats:.4f} nats"
    )
    typer.echo(f"written to {out} in {time.monotonic() - start:.1f} s")


@app.command()
def tokenize(
    inputs: Annotated[
        list[Path],
        typer.Argument(
            help="jsonl, ndjson, json (.gz, .bz2, .zst), parquet, text files, directories of them."
        ),
    ],
    out: Annotated[str, typer.Option(help="Prefix of the .bin/.idx pair to write.")],
    ranks: Ranks = None,
    workers: Annotated[
        int,
        typer.Option(
            min=1,
            default_factory=available_cpus,
            envvar="SLURM_CPUS_PER_TASK",
            help="Worker processes; by default the number of available CPUs.",
        ),
    ] = ...,  # type: ignore[assignment]  # typer calls default_factory
    text_field: Annotated[
        str | None,
        typer.Option(
            help="Column of the text, `text` by default; `messages` reads the conversation of "
            "rows that hold both."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Shuffle seed of the documents.")] = 0,
    keep_order: Annotated[bool, typer.Option(help="Do not shuffle.")] = False,
    max_rejected: MaxRejected = 1000,
    shard: Annotated[
        str | None,
        typer.Option(
            help="Tokenize part I of N only, I from 0; `phi4 data merge` combines the parts."
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option(help="Replace a pair made from other documents or options.")
    ] = False,
) -> None:
    """Tokenize documents into a Megatron .bin/.idx pair with a manifest; resumes if interrupted.

    Rows hold `text`, or a conversation under `messages` or `prompt` and `completion`. Rejected rows
    go to PREFIX.rejected.jsonl. A pair that this command has already finished is left unchanged.
    """
    config = tokenizer_config(ranks)
    found = find_inputs(inputs)
    echo_skipped(found.skipped)
    facts = load_tokenizer(config).facts
    order = None if keep_order else seed
    plan = make_plan(found, facts, text_column=text_field, seed=order)
    if is_finished(plan, out, overwrite=overwrite):
        typer.echo(f"{out} is finished: made from these inputs with these options")
        return
    tokenize_parts(
        plan,
        out,
        config,
        workers=workers,
        shard=_shard(shard),
        max_rejected=max_rejected,
        follow=_show_progress,
    )
    if shard is None:
        merge(out)
    else:
        typer.echo(f"shard {shard} done; when all are, run `phi4 data merge {out}`")


@app.command()
def merge(prefix: Prefix) -> None:
    """Merge the parts of `phi4 data tokenize --shard` into one pair."""
    start = time.monotonic()
    manifest = merge_runs(prefix)
    typer.echo(
        f"{prefix}: {manifest.num_documents} documents, {manifest.num_tokens} tokens, "
        f"{_left_out(prefix, manifest.num_rejected)}, merged in {time.monotonic() - start:.1f} s"
    )


@app.command()
def verify(path: Pairs) -> None:
    """Compare token files with the checksums of their manifests."""
    prefixes, failures = shard_prefixes(path), []
    for prefix in prefixes:
        try:
            manifest = TokenFile(prefix).verify()
        except DataError as error:
            failures.append(error)
            if len(prefixes) > 1:
                typer.echo(f"{prefix}: {error}", err=True)
        else:
            typer.echo(f"{prefix}: {manifest.num_documents} documents, checksums match")
    if len(prefixes) > 1 and failures:
        raise DataError(
            f"{len(failures)} of {len(prefixes)} pairs under {path} are damaged; the lines above "
            "name them"
        )
    if failures:
        raise failures[0]


@app.command()
def adopt(prefix: Prefix, ranks: Ranks = None) -> None:
    """Write the manifest of a pair that Megatron's tools wrote with the given tokenizer."""
    tokenizer = tokenizer_of(ranks)
    manifest = adopt_pair(prefix, tokenizer.facts)
    typer.echo(
        f"{manifest_path(prefix)}: {manifest.num_tokens} tokens, all ids in the vocabulary, all "
        f"{manifest.num_documents} documents end with token {tokenizer.eod_id}"
    )


def _left_out(prefix: str, num_rows: int) -> str:
    """How many rows were dropped; the list has blank rows too, so it is not called rejected."""
    if not num_rows:
        return "no row left out"
    return f"{num_rows} rows left out (bad or blank: see {prefix}.rejected.jsonl)"


def _shard(text: str | None) -> tuple[int, int]:
    if text is None:
        return 0, 1
    index, _, count = text.partition("/")
    if not (index.isdigit() and count.isdigit() and int(index) < int(count)):
        raise ConfigError(f"--shard {text}; expected I/N with I from 0 to N - 1, for example 0/8")
    return int(index), int(count)


def _show_progress(progress: TokenizeProgress) -> None:
    line = (
        f"{progress.done_bytes / max(1, progress.total_bytes):6.1%}  "
        f"{progress.num_tokens:,} tokens, {progress.num_tokens / progress.seconds:,.0f} tokens/s, "
        f"{progress.remaining_seconds:.0f} s left"
    )
    typer.echo(line, err=True)
