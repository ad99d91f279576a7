"""Sample a model's answers to questions into a file; a stopped job can be resumed.

A file of answers is always complete. Until then the answers to complete questions are appended to a
journal next to it, in the order in which they finish, and at the end the journal becomes the file,
in the order of the questions. Nothing that was written is sampled again, and no reader mistakes a
part for the full file.
"""

import hashlib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from phi4.data.files.atomic_files import write_atomically
from phi4.data.vocabulary.tokenizer import Tokenizer
from phi4.errors import ConfigError, DataError
from phi4.pts.answers import AnswerRow
from phi4.sampling.batch import Answer, answers
from phi4.sampling.protocol import Request, Sampler
from phi4.sampling.questions import KeyedQuestion
from phi4.sampling.text import completion_text, end_ids


class AnswerSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Settings of the sampling; two files with equal settings have equal answers.

    Attributes:
        model: identity of the model.
        questions: hash of their ids, prompts and keys, in order.
        n: samples of each question.
        max_tokens: maximum tokens of an answer; fewer if the model's context is full.
        temperature, top_p, top_k, min_p, stop: see `phi4.sampling.protocol.Request`.
        seed: each question's own seed is a function of this and of the question's id.
    """

    model: str
    questions: str
    n: int
    max_tokens: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    seed: int
    stop: tuple[str, ...]


def questions_digest(questions: Iterable[KeyedQuestion]) -> str:
    """sha256 of questions, for `AnswerSettings.questions`."""
    digest = hashlib.sha256()
    for one in questions:
        digest.update(msgspec.json.encode((one.id, one.prompt, one.key, one.task)) + b"\n")
    return digest.hexdigest()


def question_seed(seed: int, question: str) -> int:
    """Return the seed of a question's request, independent of other questions."""
    digest = hashlib.sha256(f"{seed}:{question}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


@dataclass(frozen=True)
class AnswerFile:
    """A file of answers and its journal.

    Attributes:
        path: path of the finished file.
        settings: settings of its answers.
    """

    path: Path
    settings: AnswerSettings

    @property
    def journal(self) -> Path:
        """Path of the answers until all are complete."""
        return self.path.with_name(self.path.name + ".journal")

    @property
    def _settings_path(self) -> Path:
        return self.path.with_name(self.path.name + ".settings.json")

    def begin(self) -> bool:
        """Return whether answers remain to be sampled.

        Raises:
            ConfigError: the file, or the journal of an earlier job, has other settings.
            DataError: an unrelated file has this name.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self._settings_path.exists():
            self._check_settings()
        elif self.path.exists():
            raise DataError(
                f"{self.path} was not written by `phi4 answers draw`; remove it, or give another "
                "--out"
            )
        else:
            content = msgspec.json.format(msgspec.json.encode(self.settings), indent=2)
            write_atomically(self._settings_path, content + b"\n")
        return not self.path.exists()

    def done(self) -> dict[str, list[AnswerRow]]:
        """Return answers of the journal by question; cut off an incomplete last line.

        Raises:
            DataError: a line in its middle is damaged.
        """
        if not self.journal.exists():
            return {}
        content = self.journal.read_bytes()
        whole, _, torn = content.rpartition(b"\n")
        if torn:
            os.truncate(self.journal, len(content) - len(torn))
        decoder = msgspec.json.Decoder(list[AnswerRow])
        done = {}
        for number, line in enumerate(whole.split(b"\n") if whole else (), start=1):
            try:
                rows = decoder.decode(line)
            except (msgspec.DecodeError, UnicodeDecodeError) as error:
                raise DataError(
                    f"{self.journal}:{number} is damaged: {error}; remove the file to sample all "
                    f"answers again"
                ) from None
            done[rows[0].question] = rows
        return done

    def finish(self, order: Iterable[str]) -> None:
        """Convert the journal to the file, in the order of the questions."""
        done = self.done()
        lines = (msgspec.json.encode(row) + b"\n" for name in order for row in done[name])
        write_atomically(self.path, b"".join(lines))
        self.journal.unlink(missing_ok=True)

    def _check_settings(self) -> None:
        try:
            found = msgspec.json.decode(self._settings_path.read_bytes(), type=AnswerSettings)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise DataError(f"{self._settings_path} is damaged: {error}; remove it") from None
        for name in AnswerSettings.__struct_fields__:
            was, asked = getattr(found, name), getattr(self.settings, name)
            if was != asked:
                raise ConfigError(
                    f"{self.path} has answers with {name}={was}, but {asked} was requested; give "
                    f"another --out, or remove it and {self._settings_path.name}"
                )


def draw_answers(
    sampler: Sampler,
    questions: Sequence[KeyedQuestion],
    tokenizer: Tokenizer,
    file: AnswerFile,
) -> int:
    """Sample the missing answers, and finish the file.

    Args:
        sampler: sampler of the settings' model.
        questions: questions of the settings.
        tokenizer: tokenizer of the model.
        file: `AnswerFile.begin` returned True.

    Returns:
        Number of questions answered by this call.

    Raises:
        ConfigError: a question's request is impossible.
        SamplerError: see `Sampler.step`.
    """
    done = file.done()
    missing = [one for one in questions if one.id not in done]
    room = sampler.limits.max_sequence_tokens
    requests = (_request(one, file.settings, tokenizer, room) for one in missing)
    with file.journal.open("ab") as journal:
        for answer in answers(sampler, requests):
            rows = _rows(missing[answer.index], answer, tokenizer, file.settings)
            journal.write(msgspec.json.encode(rows) + b"\n")
            journal.flush()
    file.finish(one.id for one in questions)
    return len(missing)


def _request(
    question: KeyedQuestion, settings: AnswerSettings, tokenizer: Tokenizer, room: int | None
) -> Request:
    max_tokens = settings.max_tokens
    if room is not None:
        max_tokens = max(1, min(max_tokens, room - len(question.prompt)))
    return Request(
        prompt=question.prompt,
        max_tokens=max_tokens,
        n=settings.n,
        temperature=settings.temperature,
        top_p=settings.top_p,
        top_k=settings.top_k,
        min_p=settings.min_p,
        seed=question_seed(settings.seed, question.id),
        stop_ids=end_ids(tokenizer),
        stop_strings=tuple(text.encode(errors="surrogateescape") for text in settings.stop),
    )


def _rows(
    question: KeyedQuestion, answer: Answer, tokenizer: Tokenizer, settings: AnswerSettings
) -> list[AnswerRow]:
    return [
        AnswerRow(
            question=question.id,
            prompt_ids=list(question.prompt),
            prompt=question.text,
            key=question.key,
            task=question.task,
            model=settings.model,
            sample=completion.sample,
            seed=answer.request.seed,
            temperature=settings.temperature,
            ids=[token.id for token in completion.tokens],
            text=completion_text(tokenizer, answer.request, completion),
            finish_reason=str(completion.finish_reason),
        )
        for completion in answer.completions
    ]
