"""`phi4 judge`: pairs of full answers, ordered by a model or an oracle."""

from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from phi4.cli.asked_model import AskedModel, RemoteModel, find_asked_model
from phi4.cli.command_words import option_words
from phi4.cli.data_options import Ranks, tokenizer_of
from phi4.cli.file_errors import FileErrorsGroup
from phi4.cli.sampling_options import CacheTokens
from phi4.errors import ConfigError
from phi4.oracles.registry import open_oracle
from phi4.pts.answer_groups import AnswerGroups
from phi4.pts.answer_turns import turns_of
from phi4.pts.judged.assess import BothOrders, ByOracle
from phi4.pts.judged.job import REPLIES, judge_pairs
from phi4.pts.judged.recipe import SECTIONS, JudgeRecipe, load_judge_recipe
from phi4.pts.judged.report import JudgeReport
from phi4.sampling.judge import ModelJudge
from phi4.sampling.judge_prompt import JudgePrompt
from phi4.sampling.judge_replies import ReplyStore

if TYPE_CHECKING:
    from phi4.data.vocabulary.tokenizer import Tokenizer
    from phi4.sampling.protocol import Sampler

_ORACLE = "oracle:"

JudgeName = Annotated[
    str,
    typer.Option(
        metavar="MODEL",
        help="A run or Hugging Face directory; http://HOST:PORT/v1#NAME; or oracle:NAME.",
    ),
]
Out = Annotated[Path, typer.Option(help="Output directory; the same directory resumes.")]
Words = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[SECTION.KEY=VALUE]...",
        help="Overrides of [ask] and [pairs] in the judge recipe, or of a local judge's layout.",
        show_default=False,
    ),
]
RecipeFile = Annotated[Path | None, typer.Option(help="Judge recipe: TOML with [ask] and [pairs].")]
Template = Annotated[
    Path | None, typer.Option(help="File with another prompt template for the judge.")
]
JudgeRanks = Annotated[
    str | None, typer.Option(help="Rank file of an endpoint's tokenizer; by default --ranks.")
]
Form = Annotated[
    Literal["chat", "ids"],
    typer.Option(
        help="Format of prompts to an endpoint: chat messages, or token ids (vLLM's extension)."
    ),
]

app = typer.Typer(cls=FileErrorsGroup, no_args_is_help=True)

AnswerFiles = Annotated[
    list[Path],
    typer.Option("--answers", help="File of `phi4 answers draw`; repeat it for each model."),
]


@app.callback()
def _group() -> None:
    """Make a single command a command of the group."""


@app.command("pairs")
def pairs_command(
    answers: AnswerFiles,
    judge: JudgeName,
    out: Out,
    words: Words = None,
    recipe: RecipeFile = None,
    template: Template = None,
    ranks: Ranks = None,
    judge_ranks: JudgeRanks = None,
    form: Form = "chat",
    cache_tokens: CacheTokens = None,
) -> None:
    """Compare answers of several models pairwise, and write pairs for `phi4 data pairs`.

    A judge sees each two answers in both orders. If the orders have different winners, it abstains;
    if the difference is below the margin, they tie. `overall.jsonl` orders by the mean of accuracy,
    style and detail, `accuracy.jsonl` by accuracy. Replies without a valid opinion are requested
    again and end in `quarantine.jsonl`. All replies are stored in OUT: the same command requests
    only the missing ones. `oracle:NAME` compares with the reference answers instead.
    """
    overrides = words or []
    own = [word for word in overrides if word.split(".")[0] in SECTIONS]
    layout = [word for word in overrides if word not in own]
    settings = load_judge_recipe(recipe, own)
    if judge.startswith(_ORACLE):
        if layout:
            raise ConfigError(
                f"{layout[0]} sets the layout of a model, and {judge} is an oracle; leave it out"
            )
        with closing(open_oracle(judge.removeprefix(_ORACLE))) as oracle:
            _show(judge_pairs(AnswerGroups(answers), ByOracle(oracle), settings.pairs, out))
        return
    model = _with_form(find_asked_model(judge, layout, judge_ranks), form)
    # Errors in these are reported before processes start and weights are read.
    groups, prompt = AnswerGroups(answers), JudgePrompt(template)
    tokenizer = model.tokenizer()
    if ranks is not None or isinstance(model, RemoteModel):
        tokenizer = tokenizer_of(ranks)

    def use(sampler: "Sampler") -> None:
        _judge(sampler, model, (groups, tokenizer), prompt, settings, out)

    options = {
        "--judge": judge,
        "--out": out,
        "--recipe": recipe,
        "--template": template,
        "--ranks": ranks,
        "--cache-tokens": cache_tokens,
    }
    argv = [
        *("judge", "pairs", *(f"--answers={path}" for path in answers)),
        *option_words(options),
        *("--", *overrides),
    ]
    raise typer.Exit(model.ask(argv, cache_tokens, use))


def _with_form(model: AskedModel, form: str) -> AskedModel:
    if not isinstance(model, RemoteModel):
        return model
    from phi4.sampling.endpoint import PromptForm

    return replace(model, endpoint=replace(model.endpoint, form=PromptForm(form)))


def _judge(
    sampler: "Sampler",
    model: AskedModel,
    answers: "tuple[AnswerGroups, Tokenizer]",
    prompt: JudgePrompt,
    settings: JudgeRecipe,
    out: Path,
) -> None:
    """The part of the process that leads the model."""
    groups, tokenizer = answers
    out.mkdir(parents=True, exist_ok=True)
    with closing(ReplyStore(out / REPLIES)) as store:
        asked = ModelJudge(
            sampler,
            model.tokenizer(),
            model.identity,
            prompt=prompt,
            sampling=settings.ask.sampling(),
            store=store,
        )
        turns = partial(turns_of, tokenizer=tokenizer)
        assessor = BothOrders(asked, settings.ask.retries, turns)
        _show(judge_pairs(groups, assessor, settings.pairs, out))


def _show(report: JudgeReport) -> None:
    for line in report.lines():
        typer.echo(line)
