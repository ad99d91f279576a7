"""`phi4 answers`: sample answers to a file of questions, and score them."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from phi4.cli.asked_model import ModelPlace, find_asked_model
from phi4.cli.command_words import option_words
from phi4.cli.data_options import Ranks
from phi4.cli.file_errors import FileErrorsGroup
from phi4.cli.sampling_options import (
    CacheTokens,
    MaxTokens,
    MinP,
    SamplingOptions,
    Seed,
    Stop,
    Temperature,
    TopK,
    TopP,
)
from phi4.errors import DataError
from phi4.oracles.registry import open_oracle
from phi4.pts.answers import read_answers
from phi4.pts.draw_answers import AnswerFile, AnswerSettings, draw_answers, questions_digest
from phi4.pts.score import Score, gain, score_answers
from phi4.sampling.prompts import PromptReader
from phi4.sampling.questions import read_questions

if TYPE_CHECKING:
    from phi4.sampling.protocol import Sampler

app = typer.Typer(cls=FileErrorsGroup, no_args_is_help=True)

Questions = Annotated[
    Path,
    typer.Option(
        "--questions",
        help="JSON Lines with `prompt` (text), `messages` or `prompt_ids`, and `answer` "
        "(the reference answer) if answers are to be graded.",
    ),
]
IsChat = Annotated[bool, typer.Option("--chat", help="Treat `prompt` as a user turn.")]
OracleName = Annotated[
    str, typer.Option("--oracle", help="Oracle that grades answers: exact, choice, math or code.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="Layout overrides of a local model, for example parallel.tensor=2."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


@app.callback()
def _group() -> None:
    """Make a single command a command of the group."""


@dataclass(frozen=True)
class Drawing:
    """How a command draws answers.

    Attributes:
        questions: file of questions.
        n: samples of each.
        chat: whether a `prompt` is a user's turn.
        options: how answers are drawn.
        overrides: layout of a model on disk.
        ranks: rank file of an endpoint's tokenizer.
        cache_tokens: as in `on_model_ranks`.
    """

    questions: Path
    n: int
    chat: bool
    options: SamplingOptions
    overrides: Sequence[str] = ()
    ranks: str | None = None
    cache_tokens: int | None = None

    def draw(self, place: str, out: Path) -> int:
        """Draw the answers of a model into a file, or what the file lacks of them.

        Args:
            place: of the model, as `find_asked_model` takes it.
            out: the file.

        Returns:
            Exit code of the processes that drew.

        Raises:
            ConfigError: the file is of other settings.
        """
        model = find_asked_model(place, self.overrides, self.ranks)
        tokenizer = model.tokenizer()
        questions = list(read_questions(self.questions, PromptReader(tokenizer, self.chat, None)))
        if not questions:
            raise DataError(f"--questions={self.questions} has no question; write one a line")
        settings = AnswerSettings(
            model=model.identity,
            questions=questions_digest(questions),
            n=self.n,
            max_tokens=self.options.max_tokens,
            temperature=self.options.temperature,
            top_p=self.options.top_p,
            top_k=self.options.top_k,
            min_p=self.options.min_p,
            seed=self.options.seed,
            stop=self.options.stop,
        )
        file = AnswerFile(out, settings)
        if not file.begin():
            typer.echo(f"{out} is finished: {len(questions)} questions, {self.n} answers each")
            return 0

        def use(sampler: "Sampler") -> None:
            count = draw_answers(sampler, questions, tokenizer, file)
            earlier = f", {len(questions) - count} of them earlier" * (count < len(questions))
            typer.echo(f"{out}: {len(questions)} questions{earlier}, {self.n} answers each")

        return model.ask(self._arguments(place, out), self.cache_tokens, use)

    def _arguments(self, place: str, out: Path) -> list[str]:
        """What makes `phi4` draw the same, for the workers of a layout."""
        values = {
            "--chat": self.chat,
            "--ranks": self.ranks,
            "--cache-tokens": self.cache_tokens,
        }
        return [
            *("answers", "draw", f"--questions={self.questions}", f"--out={out}", f"--n={self.n}"),
            *option_words(values),
            *self.options.arguments(),
            *("--", place, *self.overrides),
        ]


@app.command()
def draw(
    model: ModelPlace,
    questions: Questions,
    out: Annotated[Path, typer.Option(help="Output file, JSON Lines.")],
    overrides: Overrides = None,
    n: Annotated[int, typer.Option("--n", min=1, help="Answers per question.")] = 8,
    chat: IsChat = False,
    max_tokens: MaxTokens = 512,
    temperature: Temperature = 1.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    min_p: MinP = 0.0,
    seed: Seed = 0,
    stop: Stop = None,
    ranks: Ranks = None,
    cache_tokens: CacheTokens = None,
) -> None:
    """Sample answers to every question of a file; resumes if interrupted.

    A question's answers depend on the seed and on the question only. Rows hold the question and its
    reference answer, so that they can be graded later. An answer is truncated at --max-tokens or at
    the model's maximum sequence length. Until all answers exist they are in OUT.journal;
    OUT.settings.json records the sampling settings, and a file of other settings is refused.
    """
    options = SamplingOptions(max_tokens, temperature, top_p, top_k, min_p, seed, tuple(stop or ()))
    drawing = Drawing(questions, n, chat, options, overrides or (), ranks, cache_tokens)
    raise typer.Exit(drawing.draw(model, out))


@app.command()
def score(
    files: Annotated[
        list[Path],
        typer.Argument(metavar="ANSWERS [AFTER]", help="One file of answers, or two to compare."),
    ],
    oracle: OracleName,
    as_json: AsJson = False,
) -> None:
    """Compute the accuracy of a file of answers; with a second file, also the difference.

    Accuracy is a mean over questions, ± its standard error. A truncated answer is wrong. An answer
    that cannot be graded is counted separately. Two files are compared question by question.
    """
    if len(files) > 2:
        raise DataError(f"{len(files)} files; give one, or two to compare")
    scores = [scored(path, oracle) for path in files]
    compared = gain(*scores) if len(scores) == 2 else None
    if as_json:
        rows = [score_row(path, one) for path, one in zip(files, scores, strict=True)]
        extra = {} if compared is None else {"gain": vars(compared)}
        typer.echo(json.dumps({"scores": rows, **extra}))
        return
    for path, one in zip(files, scores, strict=True):
        typer.echo(f"{path}: {_described(one)}")
    if compared is not None:
        typer.echo(f"gain: {compared}, over {compared.num_questions} questions")


def scored(path: Path, oracle_name: str) -> Score:
    """The score of a file of answers.

    Raises:
        ConfigError: there is no such oracle.
        DataError: the file cannot be read or has no answer.
    """
    oracle = open_oracle(oracle_name)
    try:
        return score_answers(read_answers(path), oracle)
    finally:
        oracle.close()


def score_row(path: Path, score: Score) -> Mapping[str, object]:
    """A score as a JSON object."""
    accuracy = score.accuracy
    return {
        "answers": str(path),
        "accuracy": accuracy.mean,
        "standard_error": accuracy.standard_error,
        "num_questions": accuracy.num_questions,
        "num_answers": score.num_answers,
        "num_truncated": score.num_truncated,
        "num_ungradable": score.num_ungradable,
        "num_ungraded_questions": score.num_ungraded_questions,
    }


def _described(score: Score) -> str:
    accuracy = score.accuracy
    text = f"{accuracy} right, {accuracy.num_questions} questions, {score.num_answers} answers"
    if score.num_truncated:
        text += f", {score.num_truncated} cut off and wrong"
    if score.num_ungradable:
        text += (
            f", {score.num_ungradable} could not be graded and do not count; "
            f"{score.num_ungraded_questions} questions have no other"
        )
    return text
