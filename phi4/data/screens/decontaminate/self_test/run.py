"""Measure the detector: items inserted in known ways into text that is known to be clean.

Thresholds are chosen on one half of items and clean text and measured on the other; reported first
is the measurement at the thresholds that the command uses. An item counts as found if the text is
rejected *and* the inserted item is among its matches.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from phi4.data.screens.decontaminate.rule import Detector, Thresholds, Verdict, default_thresholds
from phi4.data.screens.decontaminate.self_test.items import Material, SelfTestText
from phi4.data.screens.decontaminate.self_test.plants import PLANTS

MAX_FALSE_ALARMS = 0.005
_TOLERATED_LOSS = 0.02
_PROMISED = [kind for kind in PLANTS if kind != "options left out"]
"""A question alone is a part of an item; a short one is below any reasonable threshold."""
_STEPS = tuple(step / 20 for step in range(1, 21))
_ALWAYS = 2.0
"""Above every threshold: a 13-gram match."""

Follow = Callable[[str], None]
"""Called with a description of each piece of work before it begins."""


def _ignore(_: str) -> None:
    """Ignore progress."""


@dataclass(frozen=True)
class Measured:
    """Counts of one detector on one half.

    Attributes:
        planted, found: counts by way of insertion.
        num_clean, num_false: clean texts, and how many of them were rejected.
    """

    normalisation: str
    thresholds: Thresholds
    planted: dict[str, int]
    found: dict[str, int]
    num_clean: int
    num_false: int

    def recall(self, kind: str) -> float:
        """Return the fraction of the inserted items that were found; 1 if the way was never
        applicable."""
        return self.found[kind] / self.planted[kind] if self.planted[kind] else 1.0

    def precision(self, kind: str) -> float:
        """Return the fraction of true findings if items inserted one way are mixed with all clean
        texts."""
        findings = self.found[kind] + self.num_false
        return self.found[kind] / findings if findings else 1.0

    @property
    def false_alarms(self) -> float:
        """Return the fraction of the clean texts that were rejected."""
        return self.num_false / self.num_clean


@dataclass(frozen=True)
class SelfTest:
    """Results on both halves for one normalisation."""

    normalisation: str
    chosen: Thresholds
    """Thresholds chosen on the choosing half alone."""
    choosing: Measured
    measuring: Measured
    """Both at the thresholds that the command uses."""


def run_self_test(
    text: SelfTestText,
    normalisation: str,
    thresholds: Thresholds | None = None,
    *,
    seed: int = 0,
    follow: Follow = _ignore,
) -> SelfTest:
    """Choose thresholds on one half, measure on both at those in use.

    Args:
        text: items and clean text.
        normalisation: `robust` or `paper`.
        thresholds: those in use; default to those of the normalisation.
        seed: seed of the insertions.
        follow: reports progress.
    """
    thresholds = thresholds or default_thresholds(normalisation)

    def say(stage: str) -> Follow:
        return lambda work: follow(f"{normalisation}, {stage}: {work}")

    chosen = choose_thresholds(
        text.choosing, text.reference, normalisation, follow=say("choosing thresholds")
    )
    choosing, measuring = (
        measure(half, text.reference, normalisation, thresholds, seed=seed, follow=say(stage))
        for half, stage in ((text.choosing, "choosing half"), (text.measuring, "measuring half"))
    )
    return SelfTest(normalisation, chosen, choosing, measuring)


def measure(
    material: Material,
    reference: Sequence[str],
    normalisation: str,
    thresholds: Thresholds,
    *,
    seed: int = 0,
    follow: Follow = _ignore,
) -> Measured:
    """Insert every item in every way, check the results and the clean text."""
    detector = _detector(material, reference, normalisation, thresholds)
    generator = random.Random(seed)
    planted, found = dict.fromkeys(PLANTS, 0), dict.fromkeys(PLANTS, 0)
    for kind, plant in PLANTS.items():
        follow(f"{len(material.questions)} items, {kind}")
        for index, question in enumerate(material.questions):
            planted_text = plant(question, material.clean, generator)
            if planted_text is not None:
                planted[kind] += 1
                found[kind] += _names(detector.check(planted_text), index)
    follow(f"{len(material.clean)} clean texts")
    num_false = sum(detector.check(text).finding.contaminated for text in material.clean)
    return Measured(normalisation, thresholds, planted, found, len(material.clean), num_false)


def choose_thresholds(
    material: Material,
    reference: Sequence[str],
    normalisation: str,
    *,
    seed: int = 0,
    follow: Follow = _ignore,
) -> Thresholds:
    """Return the highest share of 7-grams that misses at most 2% of the items of any supported
    kind.

    That is the one with the fewest false alarms; it is searched where these are at most half of the
    tolerated rate. `info` is half of `contaminated`.
    """
    detector = _detector(material, reference, normalisation, Thresholds(0.0, 0.0))
    follow(f"{len(material.clean)} clean texts")
    clean = np.array([_score(detector.check(text)) for text in material.clean])
    generator = random.Random(seed)
    planted = []
    for kind in _PROMISED:
        follow(f"{len(material.questions)} items, {kind}")
        texts = (
            PLANTS[kind](question, material.clean, generator) for question in material.questions
        )
        found = [
            _score(detector.check(text), index)
            for index, text in enumerate(texts)
            if text is not None
        ]
        planted.append(np.asarray(found))
    quiet = [step for step in _STEPS if np.mean(clean >= step) <= MAX_FALSE_ALARMS / 2] or [1.0]
    planted = [scores for scores in planted if len(scores)]
    best = [np.mean(scores >= quiet[0]) for scores in planted]
    contaminated = max(
        step
        for step in quiet
        if all(
            np.mean(scores >= step) >= most - _TOLERATED_LOSS
            for scores, most in zip(planted, best, strict=True)
        )
    )
    return Thresholds(contaminated / 2, contaminated)


def report(results: Sequence[SelfTest]) -> str:
    """Return the table that the command prints."""
    lines = [f"{'':18} {'':>8} " + " ".join(f"{r.normalisation:>19}" for r in results)]
    lines += [f"{'planted':18} {'items':>8} " + " ".join(["   precision  recall"] * len(results))]
    for half in ("measuring", "choosing"):
        measured = [getattr(result, half) for result in results]
        lines.append(f"{half} half")
        for kind in PLANTS:
            cells = [f"{m.precision(kind):>12.4f} {m.recall(kind):>7.4f}" for m in measured]
            lines.append(f"  {kind:16} {measured[0].planted[kind]:>8} " + " ".join(cells))
        cells = [f"{m.num_false:>9} ({m.false_alarms:>6.2%})" for m in measured]
        lines.append(f"  {'false alarms':16} {measured[0].num_clean:>8} " + "  ".join(cells))
    for r in results:
        used = r.measuring.thresholds
        lines.append(
            f"{r.normalisation}: 7-gram thresholds in use info {used.info}, contaminated "
            f"{used.contaminated}; the choosing half asks for {r.chosen.info}, "
            f"{r.chosen.contaminated}"
        )
    return "\n".join(lines)


def _detector(
    material: Material, reference: Sequence[str], normalisation: str, thresholds: Thresholds
) -> Detector:
    items = [question.item(number) for number, question in enumerate(material.questions, 1)]
    detector = Detector(items, normalisation, thresholds)
    detector.allow_common(detector.long_grams(text) for text in reference)
    return detector


def _names(verdict: Verdict, item: int) -> bool:
    return verdict.finding.contaminated and any(match.item == item for match in verdict.matches)


def _score(verdict: Verdict, item: int | None = None) -> float:
    """Return the threshold up to which a text is rejected, for one item or for any."""
    matches = [match for match in verdict.matches if item in (None, match.item)]
    return max((_ALWAYS if match.has_long else match.ratio for match in matches), default=0.0)
