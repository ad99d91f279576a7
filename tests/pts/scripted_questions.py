"""Questions, and a model that answers them by a script."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from phi4.data.vocabulary.tokenizer import Tokenizer
from phi4.pts.answers import AnswerRow
from phi4.pts.draw_answers import AnswerSettings, questions_digest
from phi4.sampling.protocol import Event, Request, Sampler
from phi4.sampling.questions import KeyedQuestion
from phi4.sampling.scripted import AnswerTable, ScriptedSampler

TOKENIZER = Tokenizer({bytes([value]): value for value in range(256)})


def question(name: str, key: str = "8") -> KeyedQuestion:
    """A question whose prompt is its name."""
    return KeyedQuestion(name, tuple(TOKENIZER.encode(f"{name}=")), f"{name}=", key, "sums")


QUESTIONS = tuple(map(question, ("4+4", "1+7", "2+6", "9+9", "5+3")))


def sampler(shares: Mapping[str, Mapping[str, float]]) -> ScriptedSampler:
    """A model that gives each answer of a question with its probability."""
    answers = {
        tuple(TOKENIZER.encode(f"{name}=")): {
            tuple(TOKENIZER.encode(text)): share for text, share in texts.items()
        }
        for name, texts in shares.items()
    }
    return ScriptedSampler(AnswerTable(answers, TOKENIZER.eod_id), TOKENIZER, 64)


def even_sampler() -> ScriptedSampler:
    """A model that is right half of the time; some of its answers are longer than others."""
    return sampler({one.id: {"8": 0.5, "17": 0.25, "nothing": 0.25} for one in QUESTIONS})


def settings(questions: Sequence[KeyedQuestion] = QUESTIONS, **changed: object) -> AnswerSettings:
    """Settings of these questions."""
    values = {
        "model": "script",
        "questions": questions_digest(questions),
        "n": 4,
        "max_tokens": 5,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "seed": 3,
        "stop": (),
    }
    return AnswerSettings(**values | changed)


def answer(name: str, text: str, sample: int = 0, *, ended: bool = True) -> AnswerRow:
    """A row that no model drew."""
    one = question(name)
    return AnswerRow(
        question=name,
        prompt_ids=list(one.prompt),
        prompt=one.text,
        key=one.key,
        task=one.task,
        model="script",
        sample=sample,
        seed=0,
        temperature=1.0,
        ids=TOKENIZER.encode(text),
        text=text,
        finish_reason="stop" if ended else "length",
    )


def write_questions(path: Path) -> Path:
    """The questions as a file."""
    rows = [{"id": one.id, "prompt": one.text, "answer": one.key} for one in QUESTIONS]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@dataclass
class Watched:
    """A sampler that notes what it is asked, and may fail after some steps.

    Attributes:
        inner: that answers.
        steps_left: before it fails; negative never does.
    """

    inner: Sampler
    steps_left: int = -1
    asked: list[Request] = field(default_factory=list)

    @property
    def limits(self) -> object:
        """Of the inner one."""
        return self.inner.limits

    def submit(self, request: Request) -> int:
        """Note it."""
        self.asked.append(request)
        return self.inner.submit(request)

    def step(self) -> Sequence[Event]:
        """Fail in the end."""
        if not self.steps_left:
            raise KeyboardInterrupt
        self.steps_left -= 1
        return self.inner.step()

    def cancel(self, request_id: int) -> None:
        """As the inner one."""
        self.inner.cancel(request_id)


@dataclass(frozen=True)
class ScriptedModel:
    """An `AskedModel` of a command.

    Attributes:
        identity: of the model.
        make: its sampler.
    """

    identity: str
    make: Callable[[], Sampler]
    max_sequence_tokens: int | None = 64

    def tokenizer(self) -> Tokenizer:
        """Of bytes."""
        return TOKENIZER

    def ask(
        self, argv: Sequence[str], cache_tokens: int | None, use: Callable[[Sampler], None]
    ) -> int:
        """In this process."""
        use(self.make())
        return 0
