"""Write rows for fine-tuning and preferences from graded answers."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from phi4.data.vocabulary.tokenizer import Tokenizer
from phi4.oracles.verdict import Grade, Oracle
from phi4.pts.answers import AnswerRow
from phi4.pts.grading import grade_answers
from phi4.pts.row_files import RowFiles, write_report
from phi4.pts.unknown.records import (
    MeasuredQuestion,
    Record,
    RecordRules,
    bogus_records,
    preference_records,
    safety_records,
    sft_records,
)
from phi4.pts.unknown.texts import Bogus, Refusals, SafetyPrompt

SFT = "sft.jsonl"
DPO = "dpo.jsonl"
REPORT = "report.json"


@dataclass(frozen=True)
class UnknownTexts:
    """External texts; see `phi4.pts.unknown.texts`."""

    refusals: Refusals
    bogus: Mapping[str, Sequence[Bogus]] = field(default_factory=dict)
    safety: Sequence[SafetyPrompt] = ()


@dataclass
class UnknownReport:
    """Counts of a job.

    Attributes:
        counts: counts of questions, of answers, and of dropped items.
        sft: number of rows by kind.
        dpo: number of rows by kind.
        accuracies: accuracies of the questions that could be graded.
    """

    counts: Counter[str] = field(default_factory=Counter)
    sft: Counter[str] = field(default_factory=Counter)
    dpo: Counter[str] = field(default_factory=Counter)
    accuracies: list[float] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """For `report.json`."""
        mean = fmean(self.accuracies) if self.accuracies else None
        return {
            **{name: self.counts[name] for name in _COUNTED},
            "mean_accuracy": mean,
            "sft": dict(self.sft),
            "dpo": dict(self.dpo),
        }

    def lines(self) -> Iterator[str]:
        """For the terminal."""
        counts = self.counts
        mean = f"{fmean(self.accuracies):.3f}" if self.accuracies else "not measured"
        yield (
            f"{counts['questions']} questions, {counts['answers']} answers: accuracy {mean}, "
            f"{counts['cut_off']} cut off, {counts['ungradable']} ungradable"
        )
        yield (
            f"{counts['usually_right']} usually right, {counts['usually_wrong']} usually wrong, "
            f"{counts['even']} at the threshold, {counts['ungraded']} without a graded answer"
        )
        for name, rows in ((SFT, self.sft), (DPO, self.dpo)):
            kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(rows.items()))
            yield f"{name}: {rows.total()} rows ({kinds or 'none'})"
        yield (
            f"left out: {counts['without_refusal']} questions without a refusal, "
            f"{counts['equal_sides']} preferences with equal sides, "
            f"{counts['foreign_bogus']} bogus questions without their question"
        )


def build_unknown(
    questions: Iterable[Sequence[AnswerRow]],
    oracle: Oracle,
    texts: UnknownTexts,
    rules: RecordRules,
    tokenizer: Tokenizer,
    out: Path,
) -> UnknownReport:
    """Grade the base model's answers and write the training rows.

    Args:
        questions: the answers to each.
        oracle: grades them.
        texts: refusals and external questions.
        rules: thresholds, and the length of a side.
        tokenizer: tokenizer of the answers' ids.
        out: directory of `sft.jsonl`, `dpo.jsonl` and `report.json`.
    """
    report, seen = UnknownReport(), set()
    with RowFiles(out, (SFT, DPO)) as files:
        for rows in questions:
            seen.add(rows[0].question)
            measured = MeasuredQuestion(rows, grade_answers(oracle, rows))
            _count(measured, rules, report)
            _write_question(measured, texts, rules, tokenizer, files, report)
        for one in texts.safety:
            row, pair = safety_records(one, rules, tokenizer)
            _write(files, SFT, [row], report)
            _write(files, DPO, [pair] if pair else [], report)
    report.counts["foreign_bogus"] = sum(
        len(found) for question, found in texts.bogus.items() if question not in seen
    )
    rule_columns = {"threshold": rules.threshold, "response_tokens": rules.response_tokens}
    write_report(out / REPORT, report.as_json() | {"oracle": oracle.name} | rule_columns)
    return report


def _write_question(
    measured: MeasuredQuestion,
    texts: UnknownTexts,
    rules: RecordRules,
    tokenizer: Tokenizer,
    files: RowFiles,
    report: UnknownReport,
) -> None:
    question = measured.rows[0].question
    refusal = texts.refusals.of(question)
    bogus = texts.bogus.get(question, ())
    _write(files, SFT, sft_records(measured, refusal, rules, tokenizer), report)
    _write(files, SFT, bogus_records(bogus, refusal, measured.facts()), report)
    if refusal is None:
        report.counts["without_refusal"] += 1
    else:
        _write(files, DPO, preference_records(measured, refusal, rules, tokenizer), report)


def _write(files: RowFiles, name: str, records: Iterable[Record], report: UnknownReport) -> None:
    counts = report.sft if name == SFT else report.dpo
    for record in records:
        row = record.row
        if name == DPO and row["chosen_ids"] == row["rejected_ids"]:
            report.counts["equal_sides"] += 1
            continue
        counts[record.kind] += 1
        files.add(name, row | {"kind": record.kind})


def _count(measured: MeasuredQuestion, rules: RecordRules, report: UnknownReport) -> None:
    counts, accuracy = report.counts, measured.accuracy
    counts["questions"] += 1
    counts["answers"] += len(measured.rows)
    counts["cut_off"] += sum(not row.is_finished for row in measured.rows)
    counts["ungradable"] += len(measured.answers(Grade.UNGRADABLE))
    if accuracy is None:
        counts["ungraded"] += 1
        return
    report.accuracies.append(accuracy)
    if accuracy == rules.threshold:
        counts["even"] += 1
    else:
        counts["usually_right" if accuracy > rules.threshold else "usually_wrong"] += 1


_COUNTED = (
    "questions",
    "answers",
    "cut_off",
    "ungradable",
    "ungraded",
    "usually_right",
    "usually_wrong",
    "even",
    "without_refusal",
    "equal_sides",
    "foreign_bogus",
)
