"""`phi4 pts pairs`: pairs of single tokens, made of pivots."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from phi4.cli.data_options import Ranks, tokenizer_of
from phi4.errors import ConfigError
from phi4.pts.pairs.choose import MixtureRules
from phi4.pts.pairs.codelion import read_codelion
from phi4.pts.pairs.job import PairFormat, PairReport, write_pairs
from phi4.pts.pairs.pivot_file import read_pivot_files


def register(app: typer.Typer) -> None:
    """Add the command to `phi4 pts`."""
    app.command("pairs")(pairs_command)


def pairs_command(
    out: Annotated[Path, typer.Option(help="Output file, JSON Lines.")],
    searched: Annotated[
        list[Path] | None,
        typer.Argument(metavar="[DIR]...", help="Directories that `phi4 pts search` wrote."),
    ] = None,
    from_codelion: Annotated[
        Path | None, typer.Option(help="Instead of DIR: a JSONL file of codelion's pts.")
    ] = None,
    form: Annotated[
        PairFormat,
        typer.Option(
            "--format", help="ids: token ids, for `phi4 data pairs`. trl, codelion: text."
        ),
    ] = PairFormat.IDS,
    share: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TASK=FRACTION",
            help="Fraction of the pairs per task; other tasks are dropped; repeatable.",
            show_default=False,
        ),
    ] = None,
    balance: Annotated[
        bool,
        typer.Option(
            "--balance",
            help="Balance pivots that raise and lower success; without --share, also balance "
            "tasks.",
        ),
    ] = False,
    max_pairs: Annotated[
        int, typer.Option(min=0, help="Maximum number of pairs; 0 for no limit.")
    ] = 0,
    seed: Annotated[int, typer.Option(help="Seed of the subsampling.")] = 0,
    ranks: Ranks = None,
) -> None:
    """Make preference pairs of single tokens from pivots: the better token over the worse one.

    Only pivots with a measured counterpart become pairs. Equal pairs are written once;
    contradicting pivots are dropped. Rows of ids hold all pivots of a trajectory, for one forward
    pass. Rows of text are written if the text encodes to the same ids; the others are counted. TRL
    appends an end token to both sides, which teaches the model to stop there.
    """
    rules = MixtureRules(_shares(share or ()), balance, max_pairs, seed)
    report = PairReport()
    if bool(searched) == (from_codelion is not None):
        raise ConfigError("give directories of `phi4 pts search` or --from-codelion, one of them")
    has_text = form is not PairFormat.IDS or from_codelion is not None
    tokenizer = tokenizer_of(ranks) if has_text else None
    if from_codelion is not None:
        assert tokenizer is not None
        pivots = read_codelion(from_codelion, tokenizer, report.left_out)
    else:
        pivots = read_pivot_files(searched or [])
    write_pairs(pivots, rules, form, tokenizer, out, report)
    for line in report.lines():
        typer.echo(line)


def _shares(texts: Sequence[str]) -> dict[str, float]:
    shares: dict[str, float] = {}
    for text in texts:
        task, _, number = text.rpartition("=")
        try:
            shares[task] = float(number)
        except ValueError:
            shares[task] = 0.0
        if not 0 < shares[task] < float("inf"):
            raise ConfigError(f"--share {text}; expected TASK=FRACTION with a number above 0")
    return shares
