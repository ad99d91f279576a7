"""Counts of all comparisons by outcome, and a summary."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from phi4.pts.judged.assess import Assessed
from phi4.pts.judged.verdicts import PairSet, SetVerdict
from phi4.sampling.judge_reply import Ratings

_SCORES = ("accuracy", "style", "detail", "overall")
_USELESS = 0.5
"""Fraction of flipped comparisons above which a judge is dominated by position bias."""


@dataclass
class ScoreSums:
    """Sums of the scores of many ratings."""

    count: int = 0
    sums: list[float] = field(default_factory=lambda: [0.0] * len(_SCORES))

    def add(self, ratings: Ratings) -> None:
        """One more."""
        self.count += 1
        for index, name in enumerate(_SCORES):
            self.sums[index] += getattr(ratings, name)

    def means(self) -> dict[str, float]:
        """By name."""
        return {n: s / self.count for n, s in zip(_SCORES, self.sums, strict=True) if self.count}


@dataclass
class JudgeReport:
    """Counts of a job; every comparison is in exactly one of a set's four outcomes, or invalid, or
    ungradable.

    Attributes:
        judge: identity.
        sees_orders: whether comparisons were shown in both orders.
        counts: counts of prompts, comparisons and dropped items.
        sets: sets of outcomes, by set.
        models: scores by model.
        shown_first: opinions with different accuracy: how often the answer shown first, or second,
            has the higher one.
    """

    judge: str
    sees_orders: bool
    counts: Counter[str] = field(default_factory=Counter)
    sets: dict[PairSet, Counter[str]] = field(
        default_factory=lambda: {name: Counter() for name in PairSet}
    )
    models: dict[str, ScoreSums] = field(default_factory=dict)
    shown_first: Counter[str] = field(default_factory=Counter)

    def note(self, assessed: Assessed) -> None:
        """Count an assessment of a comparison."""
        self.counts["comparisons"] += 1
        self.counts["refused_replies"] += len(assessed.refused)
        if not assessed.ratings:
            self.counts["ungradable" if assessed.ungradable else "invalid"] += 1
        comparison = assessed.comparison
        for order, (left, right) in enumerate(assessed.ratings):
            for row, ratings in ((comparison.left, left), (comparison.right, right)):
                self.models.setdefault(row.model, ScoreSums()).add(ratings)
            first, second = (right, left) if order else (left, right)
            if first.overall != second.overall:
                self.shown_first["first" if first.overall > second.overall else "second"] += 1

    def note_verdict(self, pair_set: PairSet, verdict: SetVerdict) -> None:
        """Count the outcome of a comparison in a set."""
        self.sets[pair_set][verdict.outcome] += 1

    @property
    def judged(self) -> int:
        """Comparisons with a verdict."""
        counts = self.counts
        return counts["comparisons"] - counts["invalid"] - counts["ungradable"]

    def words(self) -> list[str]:
        """Return warnings about the quality of the pairs."""
        return list(self._warnings())

    def _warnings(self) -> Iterator[str]:
        counts = self.counts
        if not counts["comparisons"]:
            yield (
                "Nothing was compared: no prompt has answers of two models that differ. Give the "
                "answers of several models, or set pairs.same_model=true."
            )
        elif not self.judged:
            yield "No comparison has a verdict; see quarantine.jsonl for the reasons."
        flipped = max((c["flipped"] for c in self.sets.values()), default=0)
        if self.judged and flipped == self.judged:
            place = max(self.shown_first, key=self.shown_first.__getitem__)
            yield (
                f"The judge contradicts itself in all comparisons: it preferred the answer shown "
                f"{place} in {self.shown_first[place]} of {self.shown_first.total()} opinions. It "
                f"judges the position and not the answer, so there is no pair. Use another judge."
            )
        elif self.judged and flipped > _USELESS * self.judged:
            yield (
                f"The judge contradicts itself in {flipped / self.judged:.1%} of the comparisons "
                "when the order of the answers is swapped. Use another judge, or another template."
            )

    def as_json(self) -> dict[str, Any]:
        """For `report.json`."""
        return {
            "judge": self.judge,
            **{name: self.counts[name] for name in _COUNTED},
            "judged": self.judged,
            "sets": {
                str(name): {
                    **{outcome: counts[outcome] for outcome in ("pair", "flipped", "tied")},
                    "abstained_share": counts["flipped"] / max(1, self.judged),
                }
                for name, counts in self.sets.items()
            },
            "preferred_by_place": dict(self.shown_first) if self.sees_orders else None,
            "models": {
                name: {"ratings": sums.count, **sums.means()} for name, sums in self.models.items()
            },
            "words": self.words(),
        }

    def lines(self) -> Iterator[str]:
        """For the terminal."""
        counts = self.counts
        yield f"judge {self.judge}"
        yield (
            f"{counts['prompts']} prompts, {counts['comparisons']} comparisons, "
            f"{counts['identical']} of identical answers left out, {counts['not_drawn']} not drawn"
        )
        yield (
            f"{counts['invalid']} invalid (in quarantine), {counts['ungradable']} ungradable, "
            f"{counts['cut_off']} answers cut off"
        )
        yield f"{'set':10}{'pairs':>9}{'abstained':>11}{'':>9}{'ties':>9}"
        for name, found in self.sets.items():
            share = found["flipped"] / max(1, self.judged)
            numbers = f"{found['pair']:>9}{found['flipped']:>11}{share:>9.1%}{found['tied']:>9}"
            yield f"{name:10}{numbers}"
        if self.models:
            yield f"{'accuracy':>9}{'style':>9}{'detail':>9}{'overall':>9}  model"
        for model, sums in self.models.items():
            yield "".join(f"{mean:9.2f}" for mean in sums.means().values()) + f"  {model}"
        yield from self.words()


_COUNTED = (
    "prompts",
    "answers",
    "cut_off",
    "empty",
    "identical",
    "not_drawn",
    "comparisons",
    "refused_replies",
    "invalid",
    "ungradable",
)
