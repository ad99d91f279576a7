"""The training records of one question, depending on how often the model answers it correctly.

Accuracy is measured, never self-reported. An answer that cannot be graded is not counted, and a
question whose accuracy equals the threshold is neither usually right nor usually wrong.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from phi4.data.vocabulary.chat import Message, Role
from phi4.data.vocabulary.tokenizer import Tokenizer
from phi4.oracles.verdict import Grade, Graded
from phi4.pts.answer_turns import turns_of
from phi4.pts.answers import AnswerRow
from phi4.pts.intervals import wilson_interval
from phi4.pts.unknown.texts import Bogus, Refusal, SafetyPrompt
from phi4.sampling.chat import chat_prompt


@dataclass(frozen=True)
class RecordRules:
    """Settings of the records.

    Attributes:
        threshold: a higher fraction of right answers is usually right, a lower one usually wrong.
        response_tokens: maximum tokens of each side of a preference; 0 does not truncate.
    """

    threshold: float
    response_tokens: int


@dataclass(frozen=True)
class Record:
    """A row for fine-tuning or for preferences.

    Attributes:
        kind: what it trains.
        row: columns by name.
    """

    kind: str
    row: dict[str, Any]


@dataclass(frozen=True)
class MeasuredQuestion:
    """A question with the model's graded answers.

    Attributes:
        rows: the answers, at least one.
        graded: the verdict on each.
    """

    rows: Sequence[AnswerRow]
    graded: Sequence[Graded]

    def answers(self, grade: Grade) -> list[AnswerRow]:
        """Return the answers with a grade."""
        return [r for r, g in zip(self.rows, self.graded, strict=True) if g.outcome is grade]

    @property
    def num_right(self) -> int:
        """Right answers."""
        return len(self.answers(Grade.RIGHT))

    @property
    def num_graded(self) -> int:
        """Answers that could be graded."""
        return self.num_right + len(self.answers(Grade.WRONG))

    @property
    def accuracy(self) -> float | None:
        """Fraction of right answers; None without graded ones."""
        return self.num_right / self.num_graded if self.num_graded else None

    def facts(self) -> dict[str, Any]:
        """Return the columns about the question in each of its rows."""
        low, high = wilson_interval(self.num_right, self.num_graded)
        return {
            "question": self.rows[0].question,
            "model": self.rows[0].model,
            "right": self.num_right,
            "graded": self.num_graded,
            "accuracy": self.accuracy,
            "accuracy_95": [low, high],
        }


def sft_records(
    measured: MeasuredQuestion, refusal: Refusal | None, rules: RecordRules, tokenizer: Tokenizer
) -> Iterator[Record]:
    """Yield the row for fine-tuning on a question, if there is one."""
    accuracy = measured.accuracy
    if accuracy is None or accuracy == rules.threshold:
        return
    turns = _turns(measured, refusal, tokenizer)
    if accuracy > rules.threshold:
        own = refusal and refusal.answer
        answer = own or commonest(measured.answers(Grade.RIGHT)).text.strip()
        yield Record("answer", _conversation(turns, answer) | measured.facts())
    elif refusal is not None:
        yield Record("refusal", _conversation(turns, refusal.text) | measured.facts())


def bogus_records(
    bogus: Sequence[Bogus], refusal: Refusal | None, facts: dict[str, Any]
) -> Iterator[Record]:
    """Yield a row for fine-tuning for each bogus question that has a refusal."""
    for one in bogus:
        text = one.refusal or (refusal and refusal.text)
        if text:
            turns = (Message(Role.USER, one.text),)
            yield Record("bogus", _conversation(turns, text) | facts)


def preference_records(
    measured: MeasuredQuestion, refusal: Refusal, rules: RecordRules, tokenizer: Tokenizer
) -> Iterator[Record]:
    """Yield the preferences of a question: a right answer over the refusal, the refusal over a
    wrong one.

    One or both, depending on the answers that the model gave.
    """
    prompt = chat_prompt(_turns(measured, refusal, tokenizer), tokenizer)
    refused = _side(refusal.text, rules, tokenizer)
    for grade, kind in ((Grade.RIGHT, "answer_over_refusal"), (Grade.WRONG, "refusal_over_wrong")):
        answers = measured.answers(grade)
        if not answers:
            continue
        said = _drawn_side(commonest(answers), prompt, rules, tokenizer)
        chosen, rejected = (said, refused) if grade is Grade.RIGHT else (refused, said)
        yield Record(kind, _pair(prompt, chosen, rejected) | measured.facts())


def safety_records(
    one: SafetyPrompt, rules: RecordRules, tokenizer: Tokenizer
) -> tuple[Record, Record | None]:
    """Yield the row for fine-tuning and, if there is an unsafe answer, the preference."""
    turns = (Message(Role.USER, one.prompt),)
    row = Record("safety", _conversation(turns, one.refusal))
    if one.unsafe is None:
        return row, None
    sides = (_side(text, rules, tokenizer) for text in (one.refusal, one.unsafe))
    return row, Record("safety", _pair(chat_prompt(turns, tokenizer), *sides))


def commonest(rows: Sequence[AnswerRow]) -> AnswerRow:
    """Return the most frequent answer, the first among equals; there must be at least one."""
    counts = Counter(row.text.strip() for row in rows)
    return max(rows, key=lambda row: counts[row.text.strip()])


def _turns(
    measured: MeasuredQuestion, refusal: Refusal | None, tokenizer: Tokenizer
) -> tuple[Message, ...]:
    if refusal is not None and refusal.prompt is not None:
        return (Message(Role.USER, refusal.prompt),)
    return turns_of(measured.rows[0], tokenizer)


def _conversation(turns: Sequence[Message], answer: str) -> dict[str, Any]:
    said = (*turns, Message(Role.ASSISTANT, answer))
    return {"messages": [{"role": str(m.role), "content": m.content} for m in said]}


def _drawn_side(
    answer: AnswerRow, prompt: Sequence[int], rules: RecordRules, tokenizer: Tokenizer
) -> list[int]:
    """Return an answer with its sampled ids if they follow exactly this prompt."""
    if tuple(answer.prompt_ids) != tuple(prompt):
        return _side(answer.text.strip(), rules, tokenizer)
    return answer.ids[: rules.response_tokens] if rules.response_tokens else answer.ids


def _side(text: str, rules: RecordRules, tokenizer: Tokenizer) -> list[int]:
    ids = [*tokenizer.encode(text), tokenizer.im_end_id]
    return ids[: rules.response_tokens] if rules.response_tokens else ids


def _pair(prompt: Sequence[int], chosen: list[int], rejected: list[int]) -> dict[str, Any]:
    return {"prompt_ids": list(prompt), "chosen_ids": chosen, "rejected_ids": rejected}
