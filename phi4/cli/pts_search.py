"""`phi4 pts search`: tokens of a model's answers that change the probability of success."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from phi4.cli.asked_model import ModelPlace, RemoteModel, find_asked_model, recognised
from phi4.cli.data_options import Ranks
from phi4.cli.sampling_options import CacheTokens, MaxTokens, Temperature, TopP
from phi4.errors import ConfigError
from phi4.oracles.registry import open_oracle
from phi4.pts.search.command import Search, search_and_write
from phi4.pts.search.drawing import DrawOptions
from phi4.pts.search.endpoint import check_endpoint, check_endpoint_options
from phi4.pts.search.settings import SearchMode, settings_of
from phi4.pts.search.store import check_store
from phi4.pts.search.two_requests import TwoRequestSampler
from phi4.sampling.prompts import PromptReader
from phi4.sampling.questions import read_questions

if TYPE_CHECKING:
    from phi4.sampling.protocol import Sampler

Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="Layout overrides of a local model, for example parallel.tensor=2."),
]
Questions = Annotated[
    Path,
    typer.Option(
        help="JSON Lines with `prompt` (text), `messages` or `prompt_ids`, and `answer`, "
        "the reference answer for the oracle; optionally `id` and `task`."
    ),
]
OracleName = Annotated[
    str, typer.Option("--oracle", help="Oracle that grades answers: exact, choice, math or code.")
]
Out = Annotated[Path, typer.Option(help="Directory of the search; the same command resumes it.")]
Mode = Annotated[
    SearchMode,
    typer.Option(
        help="default: confirm what the tree search finds. thorough: confirm every "
        "candidate token, at three times the cost. report: the search of the report, "
        "without confirmation."
    ),
]
IsChat = Annotated[bool, typer.Option(help="Treat `prompt` as a user turn instead of plain text.")]
System = Annotated[
    str | None, typer.Option(help="System message for conversations without one; needs --chat.")
]
Seed = Annotated[int, typer.Option(min=0, help="Sampling seed.")]
Alpha = Annotated[
    float,
    typer.Option(
        help="False discovery rate: expected share of a question's confirmed tokens that "
        "have no effect."
    ),
]


def register(app: typer.Typer) -> None:
    """Add the command to `phi4 pts`."""
    app.command("search")(search)


def search(
    model: ModelPlace,
    overrides: Overrides = None,
    *,
    questions: Questions,
    oracle: OracleName,
    out: Out,
    mode: Mode = SearchMode.DEFAULT,
    chat: IsChat = True,
    system: System = None,
    max_tokens: MaxTokens = 512,
    temperature: Temperature = 1.0,
    top_p: TopP = 1.0,
    seed: Seed = 0,
    alpha: Alpha = 0.1,
    ranks: Ranks = None,
    cache_tokens: CacheTokens = None,
) -> None:
    """Search a model's answers for pivotal tokens.

    A question is searched if 20 to 80 % of 16 answers are correct, in one correct and one wrong
    answer. OUT contains pivots.jsonl (one row per pivot, with its counterpart if there is one),
    trajectories.jsonl (for `phi4 pts show`), report.json, and search.sqlite with the verdict of
    every completion. The same command resumes an interrupted search without sampling anything
    again.

    An endpoint must accept prompts as token ids and return the ids and log-probabilities of sampled
    tokens (vLLM does); it is searched at temperature 1 and top-p 1. `phi4 serve` is searched like a
    model on disk.
    """
    _check(temperature, system, chat)
    asked = recognised(find_asked_model(model, overrides or (), ranks))
    is_limited = isinstance(asked, RemoteModel) and not asked.takes_all
    options = DrawOptions(seed=seed, max_tokens=max_tokens, temperature=temperature, top_p=top_p)
    if is_limited:
        check_endpoint_options(options)
    tokenizer = asked.tokenizer()
    job = Search(
        questions=tuple(read_questions(questions, PromptReader(tokenizer, chat, system))),
        settings=settings_of(mode, seed, alpha),
        options=options,
        model=asked.identity,
        oracle=oracle,
        directory=out,
    )
    # Errors are reported before processes start and weights are read.
    open_oracle(oracle).close()
    check_store(out, job.identity)

    def use(sampler: "Sampler") -> None:
        grader = open_oracle(oracle)
        try:
            if is_limited:
                sampler = TwoRequestSampler(sampler)
                check_endpoint(sampler, job.questions[0].prompt)
            report = search_and_write(job, sampler, tokenizer, grader)
        finally:
            grader.close()
        typer.echo("\n".join(report.lines()))

    values = {
        "--questions": questions,
        "--oracle": oracle,
        "--out": out,
        "--mode": mode.value,
        "--system": system,
        "--max-tokens": max_tokens,
        "--temperature": temperature,
        "--top-p": top_p,
        "--seed": seed,
        "--alpha": alpha,
        "--ranks": ranks,
        "--cache-tokens": cache_tokens,
    }
    argv = [
        *("pts", "search", "--chat" if chat else "--no-chat"),
        *(f"{name}={value}" for name, value in values.items() if value is not None),
        *("--", asked.identity, *(overrides or ())),
    ]
    raise typer.Exit(asked.ask(argv, cache_tokens, use))


def _check(temperature: float, system: str | None, chat: bool) -> None:
    if temperature <= 0:
        raise ConfigError(
            f"--temperature={temperature:g} always gives the same answer; a search needs "
            "a temperature above 0, for example 1"
        )
    if system is not None and not chat:
        raise ConfigError("--system needs conversations, and the prompts are texts; add --chat")
