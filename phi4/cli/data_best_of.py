"""`phi4 data best-of`: rejection sampling into rows for fine-tuning."""

from contextlib import closing
from pathlib import Path
from typing import Annotated

import typer

from phi4.cli.data_options import Ranks, tokenizer_of
from phi4.errors import ConfigError
from phi4.oracles.registry import open_oracle
from phi4.pts.answer_groups import AnswerGroups
from phi4.pts.best_of import (
    Accept,
    BestOfRules,
    Preference,
    by_oracle,
    by_scores,
    write_best,
)


def register(app: typer.Typer) -> None:
    """Add the command to `phi4 data`."""
    app.command("best-of")(best_of_command)


def best_of_command(
    answers: Annotated[list[Path], typer.Option(help="Answers of `phi4 answers draw`.")],
    out: Annotated[Path, typer.Option(help="Output file, JSON Lines.")],
    oracle: Annotated[
        str | None, typer.Option(help="Oracle that accepts correct answers, for example exact.")
    ] = None,
    judge_scores: Annotated[
        Path | None, typer.Option(help="Instead of --oracle: scores.jsonl of `phi4 judge pairs`.")
    ] = None,
    least: Annotated[
        float, typer.Option(min=1, max=5, help="Lowest mean score of a judge to keep an answer.")
    ] = 4.0,
    per_question: Annotated[
        int,
        typer.Option(
            min=0, help="Maximum number of answers kept per question; 0 keeps all accepted ones."
        ),
    ] = 1,
    prefer: Annotated[
        Preference, typer.Option(help="Which accepted answers to keep if there are more.")
    ] = Preference.FIRST,
    seed: Annotated[int, typer.Option(help="Seed of --prefer random.")] = 0,
    ranks: Ranks = None,
) -> None:
    """Keep the answers that an oracle or a judge accepts, as rows for `phi4 data tokenize`.

    Equal answers to a question are kept once. A truncated answer is wrong.
    """
    if (oracle is None) == (judge_scores is None):
        raise ConfigError("give --oracle or --judge-scores, one of them")
    rules = BestOfRules(per_question, prefer, seed)

    def write(accept: Accept) -> None:
        report = write_best(AnswerGroups(answers), accept, rules, tokenizer_of(ranks), out)
        for line in report.lines():
            typer.echo(line)

    if judge_scores is not None:
        write(by_scores(judge_scores, least))
        return
    assert oracle is not None
    with closing(open_oracle(oracle)) as opened:
        write(by_oracle(opened))
