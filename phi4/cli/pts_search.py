"""`phi4 pts search`: tokens of a model's answers that change the probability of success."""

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from phi4.cli.answers import OracleName, Overrides
from phi4.cli.asked_model import ModelPlace, RemoteModel, find_asked_model, recognised
from phi4.cli.command_words import option_words
from phi4.cli.data_options import Ranks
from phi4.cli.sampling_options import (
    CacheTokens,
    IsUserTurn,
    MaxTokens,
    System,
    Temperature,
    TopP,
    check_system,
)
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

Questions = Annotated[
    Path,
    typer.Option(
        help="JSON Lines with `prompt` (text), `messages` or `prompt_ids`, and `answer`, "
        "the reference answer for the oracle; optionally `id` and `task`."
    ),
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
    chat: IsUserTurn = True,
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
    if temperature <= 0:
        raise ConfigError(
            f"--temperature={temperature:g} always gives the same answer; a search needs "
            "a temperature above 0, for example 1"
        )
    check_system(system, chat)
    searching = _Searching(
        questions=questions,
        oracle=oracle,
        mode=mode,
        chat=chat,
        system=system,
        options=DrawOptions(seed=seed, max_tokens=max_tokens, temperature=temperature, top_p=top_p),
        alpha=alpha,
        overrides=overrides or (),
        ranks=ranks,
        cache_tokens=cache_tokens,
    )
    raise typer.Exit(searching.run(model, out))


@dataclass(frozen=True)
class _Searching:
    """How a command searches; the fields are the options of `search`."""

    questions: Path
    oracle: str
    mode: SearchMode
    chat: bool
    system: str | None
    options: DrawOptions
    alpha: float
    overrides: Sequence[str]
    ranks: str | None
    cache_tokens: int | None

    def run(self, place: str, out: Path) -> int:
        """Search a model's answers into a directory, or what the directory lacks of them.

        Args:
            place: of the model, as `find_asked_model` takes it.
            out: the directory.

        Returns:
            Exit code of the processes that searched.
        """
        asked = recognised(find_asked_model(place, self.overrides, self.ranks))
        is_limited = isinstance(asked, RemoteModel) and not asked.takes_all
        if is_limited:
            check_endpoint_options(self.options)
        tokenizer = asked.tokenizer()
        reader = PromptReader(tokenizer, self.chat, self.system)
        job = Search(
            questions=tuple(read_questions(self.questions, reader)),
            settings=settings_of(self.mode, self.options.seed, self.alpha),
            options=self.options,
            model=asked.identity,
            oracle=self.oracle,
            directory=out,
        )
        # Errors are reported before processes start and weights are read.
        open_oracle(self.oracle).close()
        check_store(out, job.identity)

        def use(sampler: "Sampler") -> None:
            with closing(open_oracle(self.oracle)) as grader:
                if is_limited:
                    sampler = TwoRequestSampler(sampler)
                    check_endpoint(sampler, job.questions[0].prompt)
                report = search_and_write(job, sampler, tokenizer, grader)
            typer.echo("\n".join(report.lines()))

        return asked.ask(self._arguments(asked.identity, out), self.cache_tokens, use)

    def _arguments(self, place: str, out: Path) -> list[str]:
        """What makes `phi4` search the same, for the workers of a layout."""
        values = {
            "--questions": self.questions,
            "--oracle": self.oracle,
            "--out": out,
            "--mode": self.mode.value,
            "--system": self.system,
            "--max-tokens": self.options.max_tokens,
            "--temperature": self.options.temperature,
            "--top-p": self.options.top_p,
            "--seed": self.options.seed,
            "--alpha": self.alpha,
            "--ranks": self.ranks,
            "--cache-tokens": self.cache_tokens,
        }
        return [
            *("pts", "search", "--chat" if self.chat else "--no-chat"),
            *option_words(values),
            *("--", place, *self.overrides),
        ]
