"""Judge answers and write two sets of pairs.

The answers of a question are judged and written together, and questions keep the order of the
files. A job that was killed and restarted thus writes the same files as an uninterrupted one.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from phi4.pts.answers import AnswerRow
from phi4.pts.judged.assess import Assessed, Assessor
from phi4.pts.judged.comparisons import AnswerPair, comparisons_of
from phi4.pts.judged.recipe import PairsSection
from phi4.pts.judged.report import JudgeReport, ScoreSums
from phi4.pts.judged.verdicts import PairSet, SetVerdict, decide
from phi4.pts.row_files import RowFiles, write_report

QUARANTINE = "quarantine.jsonl"
SCORES = "scores.jsonl"
REPORT = "report.json"
REPLIES = "replies.sqlite"

_BATCH = 1024
"""Number of comparisons that the judge processes at once."""


def judge_pairs(
    questions: Iterable[Sequence[AnswerRow]], assessor: Assessor, pairs: PairsSection, out: Path
) -> JudgeReport:
    """Judge all combinations of answers and write the results.

    Args:
        questions: the answers to each.
        assessor: compares them.
        pairs: which comparisons are made, and the criterion of a pair.
        out: directory of `overall.jsonl`, `accuracy.jsonl`, `scores.jsonl`, `quarantine.jsonl` and
            `report.json`.
    """
    report = JudgeReport(assessor.identity, assessor.sees_orders)
    names = [f"{name}.jsonl" for name in PairSet]
    with RowFiles(out, (*names, QUARANTINE, SCORES)) as files:
        for comparisons in _batches(questions, pairs, report):
            batch = assessor.assess(comparisons)
            for assessed in batch:
                report.note(assessed)
                _write_refused(files, assessed, assessor.identity)
                if assessed.ratings:
                    _write_pairs(files, assessed, pairs, report)
            for row in _scores(batch, assessor.identity):
                files.add(SCORES, row)
    write_report(out / REPORT, report.as_json() | {"pairs": pairs.model_dump()})
    return report


def _batches(
    questions: Iterable[Sequence[AnswerRow]], pairs: PairsSection, report: JudgeReport
) -> Iterator[list[AnswerPair]]:
    batch: list[AnswerPair] = []
    for rows in questions:
        report.counts["prompts"] += 1
        report.counts["answers"] += len(rows)
        report.counts["cut_off"] += sum(not row.is_finished for row in rows)
        batch += comparisons_of(rows, pairs, report.counts)
        if len(batch) >= _BATCH:
            yield batch
            batch = []
    if batch:
        yield batch


def _write_pairs(
    files: RowFiles, assessed: Assessed, pairs: PairsSection, report: JudgeReport
) -> None:
    for pair_set in PairSet:
        verdict = decide(assessed.ratings, pair_set, pairs)
        report.note_verdict(pair_set, verdict)
        if verdict.outcome == "pair":
            files.add(f"{pair_set}.jsonl", _pair_row(assessed, verdict, report.judge))


def _pair_row(assessed: Assessed, verdict: SetVerdict, judge: str) -> dict[str, object]:
    """Make a row for `phi4 data pairs`, with its origin."""
    sides = [assessed.comparison.left, assessed.comparison.right]
    ratings = [[order[place].model_dump() for order in assessed.ratings] for place in (0, 1)]
    if not verdict.left_wins:
        sides.reverse()
        ratings.reverse()
    chosen, rejected = sides
    return {
        "prompt_ids": chosen.prompt_ids,
        "chosen_ids": chosen.ids,
        "rejected_ids": rejected.ids,
        "question": chosen.question,
        "task": chosen.task,
        "judge": judge,
        "margin": abs(verdict.difference),
        "chosen_from": _source(chosen, ratings[0]),
        "rejected_from": _source(rejected, ratings[1]),
    }


def _source(row: AnswerRow, ratings: list[dict[str, int]]) -> dict[str, object]:
    return {
        "model": row.model,
        "sample": row.sample,
        "cut_off": not row.is_finished,
        "ratings": ratings,
    }


def _write_refused(files: RowFiles, assessed: Assessed, judge: str) -> None:
    left, right = assessed.comparison.left, assessed.comparison.right
    about = {
        "question": left.question,
        "left": {"model": left.model, "sample": left.sample},
        "right": {"model": right.model, "sample": right.sample},
        "judge": judge,
        "has_verdict": bool(assessed.ratings),
    }
    if assessed.ungradable:
        files.add(QUARANTINE, about | {"reason": f"ungradable: {assessed.ungradable}"})
    for one in assessed.refused:
        shown_first = "left" if one.left_first else "right"
        said = {"reason": one.refused.reason, "reply": one.refused.text}
        files.add(QUARANTINE, about | {"shown_first": shown_first, "attempt": one.attempt} | said)


def _scores(batch: Sequence[Assessed], judge: str) -> Iterator[dict[str, object]]:
    """Return the mean scores of every answer that has some."""
    sums: defaultdict[tuple[str, str, int], ScoreSums] = defaultdict(ScoreSums)
    for assessed in batch:
        comparison = assessed.comparison
        for both in assessed.ratings:
            for row, ratings in zip((comparison.left, comparison.right), both, strict=True):
                sums[row.question, row.model, row.sample].add(ratings)
    for (question, model, sample), found in sums.items():
        about = {"question": question, "model": model, "sample": sample, "judge": judge}
        yield about | found.means() | {"ratings": found.count}
