"""`phi4 data inspect`: statistics and decoded samples of a token file."""

from typing import Annotated

import numpy as np
import typer

from phi4.cli.data_options import Pairs, Ranks, tokenizer_of
from phi4.data.files.manifest import ShardManifest, read_manifest
from phi4.data.files.token_file import TokenFile
from phi4.data.stream.sources import shard_prefixes
from phi4.data.vocabulary.tokenizer import Tokenizer
from phi4.errors import DataError

_SHOWN_TOKENS = 200
_CONTEXT_TOKENS = 40
"""Shown before a pivot."""


def register(app: typer.Typer) -> None:
    """Add the command to `phi4 data`."""
    app.command("inspect")(inspect_command)


def inspect_command(
    path: Pairs,
    ranks: Ranks = None,
    samples: Annotated[
        int, typer.Option(min=0, help="Number of documents to decode and print.")
    ] = 0,
) -> None:
    """Show number of documents, length distribution and decoded samples of token files."""
    tokenizer = tokenizer_of(ranks) if samples else None
    for prefix in shard_prefixes(path):
        file = TokenFile(prefix)
        file.check_index()
        _show_file(file)
        if tokenizer:
            _show_samples(file, tokenizer, samples)


def _show_file(file: TokenFile) -> None:
    manifest = file.manifest() if read_manifest(file.prefix) is not None else None
    typer.echo(f"{file.prefix}: {_contents(file, manifest)}")
    if file.num_documents:
        first, *middle, last = np.quantile(file.document_lengths(), [0, 0.5, 0.9, 0.99, 1]).tolist()
        typer.echo(
            f"tokens per document: shortest {first:.0f}, median {middle[0]:.0f}, 90% "
            f"{middle[1]:.0f}, 99% {middle[2]:.0f}, longest {last:.0f}"
        )
    if manifest is None:
        typer.echo(f"no manifest; `phi4 data adopt {file.prefix}` writes one")
        return
    for exponent, count in enumerate(manifest.length_histogram):
        if count:
            typer.echo(f"{2**exponent:>9,} to {2 ** (exponent + 1) - 1:>9,} tokens: {count:,}")
    if file.loss_mask is not None:
        typer.echo(
            f"{np.count_nonzero(file.loss_mask) / file.num_tokens:.1%} of them count in the loss"
        )
    typer.echo(f"tokenizer {manifest.tokenizer_fingerprint}, {manifest.vocab_size} ids")
    if manifest.chat_template_sha256:
        typer.echo(f"chat format {manifest.chat_template_sha256}")


def _contents(file: TokenFile, manifest: ShardManifest | None) -> str:
    counts = f"{file.num_documents} documents, {file.num_tokens} tokens, {file.tokens.dtype}"
    match manifest and manifest.kind:
        case "pairs":
            return f"{file.num_documents} pairs, {counts}"
        case "pivots":
            # Four sequences a document; the second has an entry for each pivot.
            return f"{int(file.lengths[1::4].sum())} pivots, {counts}"
        case _:
            return counts


def _show_samples(file: TokenFile, tokenizer: Tokenizer, samples: int) -> None:
    manifest = read_manifest(file.prefix)
    given = tokenizer.facts.fingerprint
    if manifest and manifest.tokenizer_fingerprint != given:
        found = manifest.tokenizer_fingerprint
        raise DataError(
            f"{file.prefix}.bin was written by tokenizer {found[:12]}, samples would be decoded by "
            f"{given[:12]}; name the rank file of the first with --ranks"
        )
    shown = {"pairs": _pair_text, "pivots": _pivots_text}
    text_of = shown.get(manifest.kind if manifest else "documents", _document_text)
    for index in range(min(samples, file.num_documents)):
        typer.echo(f"--- document {index}\n{text_of(file, index, tokenizer)}")


def _document_text(file: TokenFile, index: int, tokenizer: Tokenizer) -> str:
    return tokenizer.decode(file.document(index)[:_SHOWN_TOKENS])


def _pair_text(file: TokenFile, index: int, tokenizer: Tokenizer) -> str:
    chosen, rejected = file.sequences(index)
    size = min(chosen.size, rejected.size)
    differ = np.flatnonzero(np.append(chosen[:size] != rejected[:size], True))[0]
    first_label = np.flatnonzero(np.append(file.document_mask(index), 1))[0]
    end = min(differ, first_label)
    pieces = {"prompt": chosen[:end], "chosen": chosen[end:], "rejected": rejected[end:]}
    return "\n".join(
        f"{name}: {tokenizer.decode(ids[:_SHOWN_TOKENS])}" for name, ids in pieces.items()
    )


def _pivots_text(file: TokenFile, index: int, tokenizer: Tokenizer) -> str:
    ids, positions, chosen, rejected = file.sequences(index)
    lines = []
    for place, better, worse in zip(positions, chosen, rejected, strict=True):
        context = ids[max(0, place + 1 - _CONTEXT_TOKENS) : place + 1]
        lines.append(
            f"position {place}: {tokenizer.decode(context)!r} then "
            f"{tokenizer.decode([better])!r}, not {tokenizer.decode([worse])!r}"
        )
    return "\n".join(lines)
