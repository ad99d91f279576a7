"""The report of a search: its counts, and the meaning of its level.

Every question ends in exactly one count, so that questions read equal questions kept and dropped.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field

from phi4.pts.search.question import SearchCost
from phi4.pts.search.rows import QuestionRows
from phi4.pts.search.settings import SearchMode, SearchSettings


@dataclass
class SearchReport:
    """Counts of a search.

    Attributes:
        settings: settings of the search.
        seconds: time of sampling and grading, over all sessions.
        questions: questions read.
        dropped: by reason.
        trajectories: searched trajectories.
        candidates: tested candidates.
        confirmed: candidates that pass at the level, including those with too small effects.
        pivots: pivots kept.
        pairs: pivots with a counterpart.
        reused: completions that did not have to be sampled.
        cost: cost of all questions.
    """

    settings: SearchSettings
    seconds: float
    questions: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    trajectories: int = 0
    candidates: int = 0
    confirmed: int = 0
    pivots: int = 0
    pairs: int = 0
    reused: int = 0
    cost: SearchCost = field(default_factory=SearchCost)

    def add(self, rows: QuestionRows) -> None:
        """Add one question."""
        self.questions += 1
        if rows.dropped:
            self.dropped[rows.dropped] += 1
        self.trajectories += len(rows.trajectories)
        self.candidates += rows.num_candidates
        self.confirmed += rows.num_confirmed
        self.pivots += len(rows.pivots)
        self.pairs += sum(one.counterpart is not None for one in rows.pivots)
        self.reused += rows.num_reused
        self.cost += rows.cost

    @property
    def kept(self) -> int:
        """Questions that were completely searched."""
        return self.questions - self.dropped.total()

    def row(self) -> dict[str, object]:
        """Return the content of `report.json`."""
        counts = ("questions", "trajectories", "candidates", "confirmed", "pivots", "pairs")
        return {
            "settings": asdict(self.settings),
            **{name: getattr(self, name) for name in counts},
            "kept": self.kept,
            "dropped": dict(sorted(self.dropped.items())),
            **asdict(self.cost),
            "reused": self.reused,
            "seconds": round(self.seconds, 3),
            "per_pivot": {
                name: round(value / self.pivots, 3) if self.pivots else None
                for name, value in self._costs().items()
            },
            "level": self.level(),
        }

    def lines(self) -> list[str]:
        """Return lines for the terminal."""
        reasons = ", ".join(f"{num} {reason}" for reason, num in sorted(self.dropped.items()))
        costs = self._costs()
        shown = f"{self.cost.completions:,} completions, {self.cost.tokens:,} tokens"
        per_pivot = ", ".join(
            f"{value / self.pivots:,.1f} {name}" for name, value in costs.items() if self.pivots
        )
        return [
            f"questions: {self.questions} read, {self.kept} kept, {self.dropped.total()} dropped"
            + (f" ({reasons})" if reasons else ""),
            f"found: {self.trajectories} trajectories, {self.candidates} candidates, "
            f"{self.confirmed} confirmed, {self.pivots} pivots, {self.pairs} pairs",
            f"cost: {shown}, {self.seconds:,.1f} seconds; {self.reused:,} completions reused, "
            f"{self.cost.truncated:,} cut off, {self.cost.ungradable:,} ungradable",
            f"per pivot: {per_pivot or 'there is none'}",
            f"level: {self.level()}",
        ]

    def level(self) -> str:
        """Return what the level bounds, in a sentence."""
        if self.settings.mode is SearchMode.REPORT:
            return "none; this mode confirms nothing, so its error rate is not bounded"
        return (
            "the expected share of a question's confirmed tokens without any effect is at "
            f"most {self.settings.alpha:g}; for effects between 0 and 0.1 there is no bound, only "
            "the simulations of docs/pts.md"
        )

    def _costs(self) -> dict[str, float]:
        cost = self.cost
        return {
            "completions": cost.completions,
            "tokens": cost.tokens,
            "seconds": self.seconds,
        }


def report_of(
    rows: Iterable[QuestionRows], settings: SearchSettings, seconds: float
) -> SearchReport:
    """Return the report of all questions."""
    report = SearchReport(settings, seconds)
    for one in rows:
        report.add(one)
    return report
