"""Write a file of pairs from pivots."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from phi4.data.vocabulary.tokenizer import Tokenizer
from phi4.errors import DataError
from phi4.pts.pairs.choose import MixtureRules, choose, without_repeats
from phi4.pts.pairs.formats import Written, codelion_rows, id_rows, trl_rows
from phi4.pts.pairs.pivot_file import PivotItem
from phi4.pts.row_files import RowFiles, write_report


class PairFormat(StrEnum):
    """Format of the rows."""

    IDS = "ids"
    TRL = "trl"
    CODELION = "codelion"


@dataclass
class PairReport:
    """Counts of a job: each pivot read becomes a pair or is dropped.

    Attributes:
        num_read: number of pivots.
        num_pairs: pairs of tokens written.
        num_rows: rows written.
        tasks: pairs by task and by the sign of the effect, `+` or `-`.
        left_out: dropped pivots by reason.
    """

    num_read: int = 0
    num_pairs: int = 0
    num_rows: int = 0
    tasks: Counter[tuple[str, str]] = field(default_factory=Counter)
    left_out: Counter[str] = field(default_factory=Counter)

    def as_json(self) -> dict[str, Any]:
        """For the report's file."""
        return {
            "pivots": self.num_read,
            "pairs": self.num_pairs,
            "rows": self.num_rows,
            "tasks": {
                task: {sign: self.tasks[task, sign] for sign in "+-"}
                for task in dict.fromkeys(task for task, _ in self.tasks)
            },
            "left_out": dict(self.left_out),
        }

    def lines(self) -> Iterator[str]:
        """For the terminal."""
        yield f"{self.num_read} pivots: {self.num_pairs} pairs in {self.num_rows} rows"
        for task, signs in self.as_json()["tasks"].items():
            share = sum(signs.values()) / max(1, self.num_pairs)
            effects = f"{signs['+']} raise success, {signs['-']} lower it"
            yield f"{share:>9.1%}  {task or 'no task'}: {effects}"
        for reason, count in self.left_out.most_common():
            yield f"{count:>9}  left out: {reason}"


def write_pairs(
    pivots: Iterable[PivotItem],
    rules: MixtureRules,
    form: PairFormat,
    tokenizer: Tokenizer | None,
    out: Path,
    report: PairReport,
) -> None:
    """Choose pivots and write them.

    Args:
        pivots: to choose from.
        rules: the mixture.
        form: form of the rows.
        tokenizer: tokenizer of the ids; None is enough for rows of ids.
        out: file of the rows; the counts are written to the same name with `.report`.
        report: receives the counts; may already count rows that did not become pivots.

    Raises:
        ConfigError: as `choose`.
        DataError: no pivot is left.
    """
    items = list(pivots)
    report.num_read = len(items) + report.left_out.total()
    kept = without_repeats(_usable(items, form, report.left_out), report.left_out)
    chosen = choose(kept, rules)
    report.left_out["not in the mixture"] += len(kept) - len(chosen)
    with RowFiles(out.parent, (out.name,)) as files:
        for together, row in _rows(chosen, form, tokenizer, report.left_out):
            files.add(out.name, row)
            report.num_rows += 1
            report.num_pairs += len(together)
            for item in together:
                report.tasks[item.task, "+" if item.dp > 0 else "-"] += 1
        # Drop zeros.
        report.left_out = +report.left_out
        if not report.num_pairs:
            said = ", ".join(f"{reason}: {count}" for reason, count in report.left_out.items())
            raise DataError(
                f"no pair to write to {out}: of {report.num_read} pivots, {said or 'none'}"
            )
    write_report(out.with_name(f"{out.name}.report"), report.as_json())


def _usable(
    items: Sequence[PivotItem], form: PairFormat, left_out: Counter[str]
) -> list[PivotItem]:
    kept = []
    for item in items:
        has_both = item.chosen is not None and item.rejected is not None
        if not has_both and form is not PairFormat.CODELION:
            left_out[item.no_pair_reason or "no counterpart was measured"] += 1
        elif item.chosen == item.rejected:
            left_out["both tokens are equal"] += 1
        else:
            kept.append(item)
    return kept


def _rows(
    items: Sequence[PivotItem],
    form: PairFormat,
    tokenizer: Tokenizer | None,
    left_out: Counter[str],
) -> Iterator[Written]:
    if form is PairFormat.IDS:
        return id_rows(items)
    assert tokenizer is not None, "only ids are written without a tokenizer"
    make = trl_rows if form is PairFormat.TRL else codelion_rows
    return make(items, tokenizer, left_out)
