"""Rejection sampling: the answers that an oracle or a judge accepts, as conversations.

The decision: an answer becomes text, because fine-tuning reads messages and closes every turn
itself. An answer whose ids have no text, or none at all, is left out and counted.
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
"""Which answers to a question are accepted; None where nothing is known of one."""


class Preference(StrEnum):
    """Which of several accepted answers to a question are kept."""

    SHORTEST = "shortest"
    FIRST = "first"
    RANDOM = "random"


@dataclass(frozen=True)
class BestOfRules:
    """What is kept.

    Attributes:
        per_question: answers at most; 0 keeps all that are accepted.
        prefer: which, where more are accepted.
        seed: of a random choice.
    """

    per_question: int
    prefer: Preference
    seed: int


@dataclass
class BestOfReport:
    """Counts of a job.

    Attributes:
        counts: of questions by how many of their answers are accepted, of answers, and of rows.
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
    """Accept what an oracle says is right."""

    def accept(rows: Sequence[AnswerRow]) -> list[bool | None]:
        grades = [graded.outcome for graded in grade_answers(oracle, rows)]
        return [None if grade is Grade.UNGRADABLE else grade is Grade.RIGHT for grade in grades]

    return accept


def by_scores(path: Path, least: float) -> Accept:
    """Accept answers whose mean overall score is high enough.

    Args:
        path: `scores.jsonl` of `phi4 judge pairs`.
        least: score from 1 to 5.

    Raises:
        DataError: a row is no score.
    """
    scores: dict[tuple[str, str, int], float] = {}
    for place, row in read_json_rows(path):
        sample, overall = row.get("sample"), row.get("overall")
        if type(sample) is not int or not isinstance(overall, int | float):
            raise DataError(f"{place} is no score; give scores.jsonl of `phi4 judge pairs`")
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
    """Write the best answers as rows of `messages`, and their counts beside them.

    Args:
        questions: the answers to each.
        accept: which are good.
        rules: how many are kept, and which.
        tokenizer: of the ids.
        out: file of the rows; the counts are in the file of this name with `.report`.

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
    """Of equal texts the first, without answers that have no text."""
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
            f"question {row.question!r} is given as ids that are no conversation, and fine-tuning "
            "reads messages; draw answers to questions with `prompt` or `messages`"
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
