"""Options that several commands of `phi4 data` share."""

from collections import Counter
from typing import Annotated

import typer

from phi4.config import TokenizerConfig
from phi4.data.vocabulary.tokenizer import Tokenizer, load_tokenizer

_SHOWN_KINDS = 8

Pairs = Annotated[
    str, typer.Argument(help="Prefix of a .bin/.idx pair, glob of prefixes, or .list file.")
]
Ranks = Annotated[
    str | None,
    typer.Option(help="Rank file of a BPE tokenizer; by default phi-4's own vocabulary."),
]
MaxRejected = Annotated[int, typer.Option(min=0, help="Abort after more rejected rows than this.")]


def tokenizer_config(ranks: str | None) -> TokenizerConfig:
    """The tokenizer of `--ranks`."""
    return TokenizerConfig(kind="phi4" if ranks is None else "bpe", path=ranks)


def tokenizer_of(ranks: str | None) -> Tokenizer:
    """The tokenizer of `--ranks`, loaded.

    Raises:
        TokenizerError: the ranks are missing or damaged.
    """
    return load_tokenizer(tokenizer_config(ranks))


def echo_skipped(kinds: Counter[str]) -> None:
    """Say which files of directories are no inputs."""
    if not kinds:
        return
    named = [f"{kind} {count}" for kind, count in kinds.most_common(_SHOWN_KINDS)]
    if len(kinds) > _SHOWN_KINDS:
        named.append(f"{len(kinds) - _SHOWN_KINDS} other kinds")
    typer.echo(f"{kinds.total()} files skipped: {', '.join(named)}", err=True)
