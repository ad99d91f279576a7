"""Compare two runs: differences of their recipes and of their results, with intervals.

Training losses are compared at equal numbers of tokens: a step's loss applies to the tokens of the
step, and both runs are averaged over the same ranges of tokens. If both drew the same data in the
same order, most of the noise is common to both and cancels in the difference.
"""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from phi4.config import Recipe, changed_keys
from phi4.config.fields import Kind
from phi4.data.stream.ledger import parse_state
from phi4.errors import Phi4Error
from phi4.rundir.checkpoints import checkpoints_dir, latest_checkpoint
from phi4.rundir.goodput import Goodput, goodput_of
from phi4.rundir.run_record import RunRecord
from phi4.rundir.state import read_state
from phi4.track.loss_curve import LossCurve
from phi4.track.noise import IntervalEstimate, mean_of, ratio_of_medians

NUM_PARTS = 4
"""Number of equal parts of the common tokens in which losses are compared; the last one is the
result."""

FEWEST_STEPS = 8
"""Minimum number of steps in a part for a mean with an interval."""

WARM_STEPS = 3
"""First steps of an attempt, which are slower because of caches and compilation."""

_ALWAYS_DIFFER = ("run.dir", "run.name")
_SAME_DATA = (
    *("run.seed", "data.sequence_length", "data.unit_tokens", "data.sources", "data.weigh_by"),
    *("data.skip_windows", "data.continue_from"),
)
_SAME_LOSS = ("tokenizer.kind", "tokenizer.sha256", "model.vocab_size")


@dataclass(frozen=True)
class LossGap:
    """Training loss of B minus that of A over a range of tokens.

    Attributes:
        from_tokens: start of the range.
        to_tokens: end of the range.
        gap: None if it has too few steps.
    """

    from_tokens: float
    to_tokens: float
    gap: IntervalEstimate | None

    def verdict(self) -> str:
        """Conclusion in words."""
        if self.gap is None:
            return f"fewer than {FEWEST_STEPS} steps: no interval"
        if not self.gap.is_sound:
            return "too few independent steps to tell"
        if not self.gap.excludes(0.0):
            return "no difference shown"
        return "B is lower" if self.gap.value < 0 else "B is higher"


@dataclass(frozen=True)
class HeldOutGap:
    """Held-out losses of both at the same tokens."""

    name: str
    tokens: float
    a: float
    b: float


@dataclass(frozen=True)
class Reach:
    """The point where B first reaches A's final loss, both as means over the same number of tokens.

    Attributes:
        loss: A's final loss.
        span_tokens: number of tokens that the means are taken over.
        step: step of B; None if it is never reached.
        tokens: tokens of B; None if it is never reached.
        a_tokens: tokens of A at its end.
    """

    loss: float
    span_tokens: float
    step: int | None
    tokens: float | None
    a_tokens: float


@dataclass(frozen=True)
class RunComparison:
    """Comparison of two runs.

    Attributes:
        differing: keys that differ, by kind: {kind: {key: (value in A, value in B)}}.
        warnings: reasons why some numbers are unreliable.
        is_paired: whether both drew the same data in the same order.
        losses: by part of the common tokens, in order; empty if losses cannot be compared.
        held_out: held-out losses, likewise.
        reach: None if losses cannot be compared.
        throughput: tokens per second of B divided by A's; None if not recorded by both.
        goodput: goodput of A and B; None for one that did not record its wall time.
    """

    differing: Mapping[Kind, Mapping[str, tuple[Any, Any]]]
    warnings: Sequence[str]
    is_paired: bool
    losses: Sequence[LossGap]
    held_out: Sequence[HeldOutGap]
    reach: Reach | None
    throughput: IntervalEstimate | None
    goodput: tuple[Goodput | None, Goodput | None]

    def to_json(self) -> dict[str, Any]:
        """Convert to plain values."""
        tree = asdict(self)
        for entry, part in zip(tree["losses"], self.losses, strict=True):
            entry["verdict"] = part.verdict()
        for entry, found in zip(tree["goodput"], self.goodput, strict=True):
            if found is not None:
                entry |= {"wall_seconds": found.wall_seconds, "share": found.share}
        return tree


def compare_runs(a: RunRecord, b: RunRecord) -> RunComparison:
    """Compare two runs."""
    changes = changed_keys(a.recipe, b.recipe)
    differing = {
        kind: {key: values for key, values in keys.items() if key not in _ALWAYS_DIFFER}
        for kind, keys in changes.items()
    }
    flat = {*differing["identity"], *differing["schedule"]}
    warnings, is_comparable = _warnings(a.recipe, b.recipe, flat)
    if is_comparable and (names := _other_content(a, b)):
        warnings.append(
            f"sources of the same name have different data ({', '.join(names)}): training losses "
            f"are of different text"
        )
        flat.add("data.sources")
    curves = LossCurve.of(a), LossCurve.of(b)
    has_losses = is_comparable and all(curve.losses.size for curve in curves)
    same_held_out = "data.held_out" not in differing["free"]
    of_a, of_b = goodput_of(a), goodput_of(b)
    return RunComparison(
        differing=differing,
        warnings=warnings,
        is_paired=not flat & set(_SAME_DATA) and not _has_roll_back(a, b),
        losses=_loss_gaps(*curves) if has_losses else [],
        held_out=_held_out_gaps(a, b) if is_comparable and same_held_out else [],
        reach=_reach(*curves) if has_losses else None,
        throughput=_throughput(a, b),
        goodput=(of_a if of_a.wall_seconds > 0 else None, of_b if of_b.wall_seconds > 0 else None),
    )


def _warnings(a: Recipe, b: Recipe, differing: set[str]) -> tuple[list[str], bool]:
    """Return warnings about the numbers, and whether losses can be compared at all."""
    found = []
    if a.run.stage != b.run.stage:
        found.append(
            f"the stages differ ({a.run.stage}, {b.run.stage}): their losses are different "
            "quantities and are not compared"
        )
    if keys := sorted(differing & set(_SAME_LOSS)):
        found.append(
            f"the tokenizers differ ({', '.join(keys)}): losses per token of different tokenizers "
            f"are not comparable, so losses are not compared; compare bits per byte of the same "
            f"text"
        )
    is_comparable = not found
    if is_comparable and "data.sources" in differing:
        found.append(
            "the training data differ (data.sources): training losses are of different text; "
            "compare the held-out losses"
        )
    if "data.sequence_length" in differing and is_comparable:
        found.append(
            "the sequence lengths differ: tokens have longer contexts in one run, which alone "
            "lowers a loss"
        )
    if _plain(a)["data"]["held_out"] != _plain(b)["data"]["held_out"] and is_comparable:
        found.append("the held-out data differ (data.held_out): held-out losses are not compared")
    return found, is_comparable


def _other_content(*records: RunRecord) -> list[str]:
    """Return sources of the same name with different content, as recorded in checkpoints."""
    a, b = (_contents(record) for record in records)
    return sorted(name for name in a.keys() & b.keys() if a[name] != b[name])


def _contents(record: RunRecord) -> dict[str, str]:
    """Return the sha256 of each source, from the ledger in the newest checkpoint; empty without
    one."""
    with suppress(Phi4Error):
        newest = latest_checkpoint(checkpoints_dir(record.run_dir))
        state = read_state(newest) if newest else None
        if state is not None and state.data is not None:
            sources = parse_state(state.data).sources.items()
            return {name: count.content for name, count in sources if count.content}
    return {}


def _plain(recipe: Recipe) -> dict[str, Any]:
    return recipe.model_dump(mode="json")


def _has_roll_back(*records: RunRecord) -> bool:
    """Return whether one of them skipped data that the other did not."""
    return any("skipped_rows" in line for record in records for line in record.steps)


def _loss_gaps(a: LossCurve, b: LossCurve) -> list[LossGap]:
    begin, end = max(a.begin, b.begin), min(a.tokens[-1], b.tokens[-1])
    if end <= begin:
        return []
    parts = np.linspace(begin, end, NUM_PARTS + 1)
    found = []
    for first, last in pairwise(parts):
        # As fine as the coarser of both runs: a step is one draw of noise.
        count = min(a.count(first, last), b.count(first, last))
        gap = None
        if count >= FEWEST_STEPS:
            edges = np.linspace(first, last, count + 1)
            spans = edges[:-1], edges[1:]
            gap = mean_of(b.means(*spans) - a.means(*spans))
        found.append(LossGap(float(first), float(last), gap))
    return found


def _held_out_gaps(a: RunRecord, b: RunRecord) -> list[HeldOutGap]:
    def measured(record: RunRecord) -> dict[tuple[str, float], float]:
        return {
            (key, line["consumed_tokens"]): line[key]
            for line in record.steps
            for key in line
            if key.startswith("held_out_loss") and "consumed_tokens" in line
        }

    of_a, of_b = measured(a), measured(b)
    common = sorted(of_a.keys() & of_b.keys(), key=lambda place: (place[1], place[0]))
    return [HeldOutGap(*place, of_a[place], of_b[place]) for place in common]


def _reach(a: LossCurve, b: LossCurve) -> Reach:
    span = (a.tokens[-1] - a.begin) / 20
    (final,) = a.means(a.tokens[-1:] - span, a.tokens[-1:])
    is_whole = b.tokens >= b.begin + span
    ends, steps = b.tokens[is_whole], b.steps[is_whole]
    low = np.flatnonzero(b.means(ends - span, ends) <= final)
    return Reach(
        loss=float(final),
        span_tokens=float(span),
        step=int(steps[low[0]]) if low.size else None,
        tokens=float(ends[low[0]]) if low.size else None,
        a_tokens=float(a.tokens[-1]),
    )


def _throughput(a: RunRecord, b: RunRecord) -> IntervalEstimate | None:
    rates = [_warm_rates(record) for record in (a, b)]
    if min(rate.size for rate in rates) < FEWEST_STEPS:
        return None
    return ratio_of_medians(rates[1], rates[0])


def _warm_rates(record: RunRecord) -> np.ndarray:
    """Return tokens per second of the steps after the first ones of each attempt."""
    seen: dict[Any, int] = {}
    rates = []
    for line in record.steps:
        attempt = line.get("attempt")
        seen[attempt] = seen.get(attempt, 0) + 1
        if seen[attempt] > WARM_STEPS and line.get("tokens_per_second", 0.0) > 0:
            rates.append(line["tokens_per_second"])
    return np.array(rates)
