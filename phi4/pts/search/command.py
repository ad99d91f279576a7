"""Run a search from its questions to its files.

Files are written from the store after all questions have ended, in the order of the questions, so
an interrupted search writes the same bytes as an uninterrupted one.
"""

import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import msgspec

from phi4.data.vocabulary.tokenizer import Tokenizer
from phi4.errors import ConfigError
from phi4.oracles.verdict import Oracle
from phi4.pts.search.drawing import BlockDrawing, DrawOptions
from phi4.pts.search.question import TOO_LONG, QuestionFound
from phi4.pts.search.report import SearchReport, report_of
from phi4.pts.search.rollouts import Share
from phi4.pts.search.rows import (
    PIVOTS_NAME,
    REPORT_NAME,
    TRAJECTORIES_NAME,
    QuestionRows,
    rows_of,
)
from phi4.pts.search.run import SearchRun
from phi4.pts.search.settings import SearchSettings
from phi4.pts.search.store import SearchStore, opened_store
from phi4.pts.search.two_requests import TwoRequestSampler
from phi4.sampling.protocol import Sampler
from phi4.sampling.questions import KeyedQuestion


@dataclass(frozen=True)
class Search:
    """A search and its settings.

    Attributes:
        questions: in the order of the files.
        settings: settings of the search of a question.
        options: how completions are sampled.
        model: identity of the model.
        oracle: name of the oracle.
        directory: directory of the store and the files.
    """

    questions: Sequence[KeyedQuestion]
    settings: SearchSettings
    options: DrawOptions
    model: str
    oracle: str
    directory: Path

    def __post_init__(self) -> None:
        """Check that the search can be stored.

        Raises:
            ConfigError: there is no question, or two have the same prompt.
        """
        if not self.questions:
            raise ConfigError("there is no question; the file given by --questions is empty")
        prompts: dict[tuple[int, ...], str] = {}
        for one in self.questions:
            if one.prompt in prompts:
                raise ConfigError(
                    f"questions {prompts[one.prompt]!r} and {one.id!r} have the same prompt, but a "
                    f"search uses each prompt once; remove one of them"
                )
            prompts[one.prompt] = one.id

    @property
    def identity(self) -> dict[str, str]:
        """Return the identity for comparison with a store: settings, sampling, model, questions,
        oracle."""
        values = {**asdict(self.settings), **asdict(self.options)}
        return {
            **{name: str(value) for name, value in values.items()},
            "model": self.model,
            "oracle": self.oracle,
            "questions": _digest(self.questions),
        }


def search_and_write(
    search: Search, sampler: Sampler, tokenizer: Tokenizer, oracle: Oracle
) -> SearchReport:
    """Search the questions that the store lacks, then write the files.

    Args:
        search: the search.
        sampler: over the model.
        tokenizer: tokenizer of the model.
        oracle: the oracle of `search`.

    Raises:
        ConfigError: the directory holds another search.
        SamplerError: the model failed; repeating the search resumes it.
    """
    if search.options.top_p < 1:
        # The completions without a token must come from the sampler's own distribution.
        sampler = TwoRequestSampler(sampler, redraws=True)
    encoder = msgspec.msgpack.Encoder()
    drawing = BlockDrawing(search.options, tokenizer, oracle)
    with opened_store(search.directory, search.identity) as store:

        def finished(question: KeyedQuestion, found: QuestionFound) -> None:
            rows = rows_of(question, found, search.model, tokenizer)
            store.save_result(question.id, encoder.encode(rows))

        longest = sampler.limits.max_sequence_tokens
        left = []
        for one in search.questions:
            if store.result(one.id) is not None:
                continue
            if longest is not None and len(one.prompt) + search.options.max_tokens > longest:
                finished(one, QuestionFound(TOO_LONG, Share()))
            else:
                left.append(one)
        begun = time.monotonic()
        try:
            SearchRun(sampler, drawing, store, search.settings, finished).run(left)
        finally:
            store.add_seconds(time.monotonic() - begun)
        return _write(search, store)


def _write(search: Search, store: SearchStore) -> SearchReport:
    decoder = msgspec.msgpack.Decoder(QuestionRows)
    json_encoder = msgspec.json.Encoder()
    names = (PIVOTS_NAME, TRAJECTORIES_NAME)
    partial = [search.directory / f"{name}.partial" for name in names]
    with partial[0].open("wb") as pivots, partial[1].open("wb") as trajectories:

        def written() -> Iterator[QuestionRows]:
            for question in search.questions:
                found = store.result(question.id)
                assert found is not None, "rows are written once every question is searched"
                rows = decoder.decode(found)
                pivots.writelines(json_encoder.encode(one) + b"\n" for one in rows.pivots)
                trajectories.writelines(
                    json_encoder.encode(one) + b"\n" for one in rows.trajectories
                )
                yield rows

        report = report_of(written(), search.settings, store.seconds())
    for path, name in zip(partial, names, strict=True):
        path.replace(search.directory / name)
    text = json.dumps(report.row(), indent=1) + "\n"
    (search.directory / REPORT_NAME).write_text(text, encoding="utf-8")
    return report


def _digest(questions: Sequence[KeyedQuestion]) -> str:
    """Hash all questions in order, which determines the order of the rows."""
    digest = hashlib.sha256()
    for one in questions:
        row = [one.id, one.prompt, one.key, one.task]
        digest.update(json.dumps(row, sort_keys=True).encode() + b"\n")
    return digest.hexdigest()[:16]
