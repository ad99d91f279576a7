"""Rejection sampling: write the answers that an oracle or a judge accepts as conversations.

An answer is converted to text, because fine-tuning reads messages and closes every turn itself. An
answer whose ids have no text representation, or no text at all, is skipped and counted.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from phi4.data.vocabulary.tokenizer import Tokenizer
from phi4.errors import DataError
from phi4.oracles.verdict import Grade, Oracle
from phi4.pts.answer_turns import turns_of
from phi4.pts.answers import AnswerRow
from phi4.pts.grading import grade_answers
from phi4.pts.json_rows import question_of, read_json_rows, text_of
from phi4.pts.row_files import RowFiles, write_report
from phi4.sampling.chat import plain_text

Accept = Callable[[Sequence[AnswerRow]], list[bool | None]]
"""Returns the accepted answers to a question, or None if none could be judged."""


class Preference(StrEnum):
    """Which of several accepted answers to a question are kept."""

    SHORTEST = "shortest"
    FIRST = "first"
    RANDOM = "random"


@dataclass(frozen=True)
class BestOfRules:
    """What is kept.

    Attributes:
        per_question: maximum number of answers; 0 keeps all accepted ones.
        prefer: which ones to keep if more are accepted.
        seed: seed of a random choice.
    """

    per_question: int
    prefer: Preference
    seed: int


@dataclass
class BestOfReport:
    """Counts of a job.

    Attributes:
        counts: counts of questions by number of accepted answers, of answers, and of rows.
    """

    counts: Counter[str] = field(default_factory=Counter)

    def as_json(self) -> dict[str, int]:
        """For the report's file."""
        return {name: self.counts[name] for name in _COUNTED}

    def lines(self) -> Iterator[str]:
        """For the terminal."""
        counts = self.counts
        yield (
            f"{counts['questions']} questions: {counts['some']} with an accepted answer, "
            f"{counts['all']} of them with no other; {counts['none']} with none, "
            f"{counts['unknown']} of which nothing is known"
        )
        yield (
            f"{counts['answers']} answers: {counts['accepted']} accepted, {counts['ungradable']} "
            f"ungradable, {counts['duplicates']} duplicates, {counts['not_text']} without text"
        )
        yield f"{counts['rows']} rows"


def by_oracle(oracle: Oracle) -> Accept:
    """Accept answers that an oracle grades as right."""

    def accept(rows: Sequence[AnswerRow]) -> list[bool | None]:
        grades = [graded.outcome for graded in grade_answers(oracle, rows)]
        return [None if grade is Grade.UNGRADABLE else grade is Grade.RIGHT for grade in grades]

    return accept


def by_scores(path: Path, least: float) -> Accept:
    """Accept answers whose mean overall score is high enough.

    Args:
        path: `scores.jsonl` of `phi4 judge pairs`.
        least: minimum score, from 1 to 5.

    Raises:
        DataError: a row is not a score.
    """
    scores: dict[tuple[str, str, int], float] = {}
    for place, row in read_json_rows(path):
        sample, overall = row.get("sample"), row.get("overall")
        if type(sample) is not int or not isinstance(overall, int | float):
            raise DataError(f"{place} is not a score; give scores.jsonl of `phi4 judge pairs`")
        scores[question_of(row, place), text_of(row, "model", place), sample] = overall

    def accept(rows: Sequence[AnswerRow]) -> list[bool | None]:
        found = [scores.get((row.question, row.model, row.sample)) for row in rows]
        return [None if score is None else score >= least for score in found]

    return accept


def write_best(
    questions: Iterable[Sequence[AnswerRow]],
    accept: Accept,
    rules: BestOfRules,
    tokenizer: Tokenizer,
    out: Path,
) -> BestOfReport:
    """Write the best answers as rows of `messages`, and a report next to them.

    Args:
        questions: the answers to each.
        accept: selects the good answers.
        rules: how many are kept, and which.
        tokenizer: tokenizer of the ids.
        out: file of the rows; the counts are written to the same name with `.report`.

    Raises:
        DataError: a question's prompt is ids that are no conversation.
    """
    report = BestOfReport()
    with RowFiles(out.parent, (out.name,)) as files:
        for rows in questions:
            accepted = accept(rows)
            _count(rows, accepted, report.counts)
            good = [row for row, is_good in zip(rows, accepted, strict=True) if is_good]
            usable = _distinct(good, tokenizer, report.counts)
            for row in _preferred(usable, rules):
                files.add(out.name, _conversation_row(row, tokenizer))
                report.counts["rows"] += 1
    write_report(out.with_name(f"{out.name}.report"), report.as_json())
    return report


def _count(
    rows: Sequence[AnswerRow], accepted: Sequence[bool | None], counts: Counter[str]
) -> None:
    num_good = sum(is_good is True for is_good in accepted)
    num_known = sum(is_good is not None for is_good in accepted)
    counts["questions"] += 1
    counts["answers"] += len(rows)
    counts["accepted"] += num_good
    counts["ungradable"] += len(rows) - num_known
    if num_good:
        counts["some"] += 1
        counts["all"] += num_good == num_known
    else:
        counts["none" if num_known else "unknown"] += 1


def _distinct(
    rows: Sequence[AnswerRow], tokenizer: Tokenizer, counts: Counter[str]
) -> list[AnswerRow]:
    """Return the first of equal texts, without answers that have no text."""
    found: dict[str, AnswerRow] = {}
    for row in rows:
        text = row.text.strip()
        if not text or not _has_text(row, tokenizer):
            counts["not_text"] += 1
        elif text in found:
            counts["duplicates"] += 1
        else:
            found[text] = row
    return list(found.values())


def _has_text(row: AnswerRow, tokenizer: Tokenizer) -> bool:
    ended = row.ids[-1] in (tokenizer.im_end_id, tokenizer.eod_id)
    try:
        plain_text(row.ids[:-1] if ended else row.ids, tokenizer)
    except DataError:
        return False
    return True


def _preferred(rows: list[AnswerRow], rules: BestOfRules) -> list[AnswerRow]:
    match rules.prefer:
        case Preference.SHORTEST:
            ordered = sorted(rows, key=lambda row: len(row.ids))
        case Preference.RANDOM:
            ordered = sorted(rows, key=lambda row: _chance(row, rules.seed))
        case Preference.FIRST:
            ordered = rows
    return ordered[: rules.per_question] if rules.per_question else ordered


def _chance(row: AnswerRow, seed: int) -> bytes:
    drawn = (seed, row.question, row.model, row.sample)
    return hashlib.sha256(repr(drawn).encode()).digest()


def _conversation_row(row: AnswerRow, tokenizer: Tokenizer) -> dict[str, Any]:
    if not row.prompt and tokenizer.im_sep_id not in row.prompt_ids:
        raise DataError(
            f"question {row.question!r} is given as ids that are not a conversation, but "
            f"fine-tuning reads messages; draw answers to questions with `prompt` or `messages`"
        )
    messages = [{"role": str(m.role), "content": m.content} for m in turns_of(row, tokenizer)]
    answer = {"role": "assistant", "content": row.text.strip()}
    return {
        "messages": [*messages, answer],
        "question": row.question,
        "task": row.task,
        "model": row.model,
        "sample": row.sample,
    }


_COUNTED = (
    "questions",
    "some",
    "all",
    "none",
    "unknown",
    "answers",
    "accepted",
    "ungradable",
    "duplicates",
    "not_text",
    "rows",
)
