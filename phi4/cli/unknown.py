"""`phi4 unknown`: rows that teach a model to say what it does not know."""

from contextlib import closing
from pathlib import Path
from typing import Annotated

import typer

from phi4.cli.data_options import Ranks, tokenizer_of
from phi4.cli.file_errors import FileErrorsGroup
from phi4.oracles.registry import open_oracle
from phi4.pts.answer_groups import AnswerGroups
from phi4.pts.unknown.job import UnknownTexts, build_unknown
from phi4.pts.unknown.records import RecordRules
from phi4.pts.unknown.texts import Refusals, read_bogus, read_safety

app = typer.Typer(cls=FileErrorsGroup, no_args_is_help=True)


@app.callback()
def _group() -> None:
    """Make a single command a command of the group."""


@app.command("build")
def build_command(
    answers: Annotated[
        Path,
        typer.Option(
            help="Several answers per question of the base model, from `phi4 answers draw`."
        ),
    ],
    oracle: Annotated[
        str, typer.Option(help="Oracle that grades them: exact, choice, math or code.")
    ],
    refusals: Annotated[
        Path, typer.Option(help='Rows {"question", "refusal"}, or {"refusal"} for any question.')
    ],
    out: Annotated[Path, typer.Option(help="Output directory.")],
    bogus: Annotated[
        Path | None, typer.Option(help='Rows {"question", "bogus", "refusal"}.')
    ] = None,
    safety: Annotated[
        Path | None, typer.Option(help='Rows {"prompt", "refusal"}, and "unsafe" for preferences.')
    ] = None,
    ranks: Ranks = None,
    threshold: Annotated[
        float,
        typer.Option(
            min=0, max=1, help="Accuracy above which the model counts as knowing the answer."
        ),
    ] = 0.5,
    response_tokens: Annotated[
        int,
        typer.Option(
            min=0, help="Truncate both sides of a preference to this many tokens; 0 keeps all."
        ),
    ] = 5,
    seed: Annotated[int, typer.Option(help="Seed of the choice among general refusals.")] = 0,
) -> None:
    """Write refusals and answers by the accuracy of the base model on each question.

    `sft.jsonl`: the model's correct answer where it is usually correct, a refusal where it is
    usually wrong, a refusal of every bogus question. `dpo.jsonl`: a correct answer over the
    refusal, and the refusal over a wrong answer; a question can give both. An answer that cannot be
    graded is not counted.
    """
    texts = UnknownTexts(
        Refusals(refusals, seed),
        {} if bogus is None else read_bogus(bogus),
        () if safety is None else read_safety(safety),
    )
    rules = RecordRules(threshold, response_tokens)
    with closing(open_oracle(oracle)) as opened:
        groups, tokenizer = AnswerGroups([answers]), tokenizer_of(ranks)
        report = build_unknown(groups, opened, texts, rules, tokenizer, out)
    for line in report.lines():
        typer.echo(line)
