"""The start gate of preference stages: detects wrong log-probability sums before the first step.

On the first rows of the run's own stream, in the run's own layout, it checks that a repeated
forward pass gives the same bits; that an answer has the same log-probability packed as alone in a
row; that this equals the cached one if the run starts from its reference model, so that every
margin is 0; and that the stage's loss equals the one computed on the host, at margin 0 and at other
margins.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from phi4.data.files.atomic_files import write_atomically
from phi4.data.stream.batch import Batch
from phi4.data.stream.references import open_references
from phi4.engine.agreement import decided_by_writer, done_by_all, raise_together
from phi4.errors import CheckpointError, DataError
from phi4.rundir.names import GATE_FILE
from phi4.rundir.state import RunState
from phi4.stages.gate.losses import mean_loss, mean_margin
from phi4.stages.gate.probe import NUM_ROWS, ProbeRow, lone_documents, read_probe
from phi4.stages.gate.tolerance import SAME_FORWARD, sum_tolerance
from phi4.stages.reference.sides import segment_sums, segment_tokens
from phi4.stages.reference.sources import cache_dir_of
from phi4.train.hooks import Hook, RunContext

_REFUSED = "training is refused (--no-gate skips this check)"


@dataclass(frozen=True)
class MeasuredRow:
    """A probe row as measured by the engine and described on the host; arrays are [N], two segments
    per pair.

    Attributes:
        row: row of the stream.
        sums: log-probabilities of the sides.
        tokens: loss tokens of the sides.
        tolerance: allowed error of the sums.
    """

    row: ProbeRow
    sums: np.ndarray
    tokens: np.ndarray
    tolerance: np.ndarray

    @property
    def reference(self) -> np.ndarray:
        """The cached log-probabilities of the sides."""
        return np.asarray(self.row.batch.segment_extras["reference"])

    @property
    def chosen_nll(self) -> np.ndarray | None:
        """Negative log-probability of each chosen side over the tokens per pair, [P]."""
        per_pair = self.row.batch.segment_extras.get("tokens_per_pair")
        return None if per_pair is None else -(self.sums / per_pair)[0::2]


class StartGate(Hook):
    """Refuses to train if a check of this module fails; runs before step 1 only."""

    def __init__(self, context: RunContext) -> None:
        self._context = context

    def start(self, state: RunState) -> None:
        """Run the checks and record the results; does nothing on resume.

        Raises:
            DataError: names what differs, with the value and the expected value.
            CheckpointError: the run starts from its reference model, but the cache is of another
                model.

        Collectives: those of `Engine.log_probs`, `Engine.evaluate` and `Engine.weights_sha256`;
        all-gathers of verdicts and broadcasts over all ranks.
        """
        if state.step:
            return
        context = self._context
        if not context.recipe.dpo.gate:
            context.say("start gate: skipped (dpo.gate=false)")
            self._record({"outcome": "skipped"})
            return
        measured = self._measured()
        starts_from_reference = self._starts_from_reference()
        if starts_from_reference:
            self._together(lambda: _compare_with_cache(measured))
            tolerance_N = np.concatenate([m.tolerance for m in measured])
            self._compare_loss(
                measured,
                [m.reference for m in measured],
                np.zeros(tolerance_N.size),
                tolerance_N,
                "with the policy equal to the reference",
            )
        planted = [_planted_ratios(m.sums.size) for m in measured]
        ratios_N = np.concatenate(planted)
        self._compare_loss(
            measured,
            [m.sums - ratios for m, ratios in zip(measured, planted, strict=True)],
            ratios_N,
            np.full(ratios_N.size, SAME_FORWARD),
            "at synthetic margins",
        )
        num_pairs = sum(m.sums.size // 2 for m in measured)
        context.say(f"start gate: passed on {num_pairs} pairs of {len(measured)} rows")
        self._record(
            {
                "outcome": "passed",
                "rows": len(measured),
                "pairs": num_pairs,
                "starts_from_reference": starts_from_reference,
            }
        )

    def _measured(self) -> list[MeasuredRow]:
        """Return the probe rows, after checking that repetition and packing change nothing."""
        context, engine = self._context, self._context.engine
        recipe, tokenizer = context.recipe, context.tokenizer
        # All replicas get the same rows, so the mean over the global batch is that of each of them.
        group = engine.layout.schedule_group
        num_rows = -(-NUM_ROWS // group) * group
        rows = done_by_all(context.platform, partial(read_probe, recipe, tokenizer, num_rows))
        batches = [row.batch for row in rows]
        first, again = engine.log_probs(batches), engine.log_probs(batches)
        self._together(lambda: _compare_repetition(rows, first, again))
        measured = []
        for row, log_probs in zip(rows, first, strict=True):
            sums, tokens = segment_sums(row.batch, log_probs), segment_tokens(row.batch)
            tolerance = sum_tolerance(sums, tokens, recipe.precision.dtype)
            measured.append(MeasuredRow(row, sums, tokens, tolerance))
        lone = lone_documents(rows, tokenizer, document_mask=recipe.data.document_mask)
        alone = engine.log_probs([document.batch for document in lone])
        lone_sums = [segment_sums(d.batch, found) for d, found in zip(lone, alone, strict=True)]

        def compare_packing() -> None:
            for document, sums in zip(lone, lone_sums, strict=True):
                _compare(
                    measured[document.row],
                    sums,
                    document.segments,
                    "alone in a padded row",
                    "check packing, positions and the document mask",
                )

        self._together(compare_packing)
        return measured

    def _starts_from_reference(self) -> bool:
        """Return whether the policy is the reference model at this point."""
        context, recipe = self._context, self._context.recipe
        if recipe.dpo.reference is None:
            return True
        cache = decided_by_writer(context.platform, partial(open_references, cache_dir_of(recipe)))
        return context.engine.weights_sha256() == cache.manifest.weights

    def _compare_loss(
        self,
        measured: Sequence[MeasuredRow],
        references: Sequence[np.ndarray],
        ratios_N: np.ndarray,
        errors_N: np.ndarray,
        where: str,
    ) -> None:
        """Compare the stage's loss and mean margin with the host's.

        Args:
            measured: the probe rows.
            references: references of each of them, [N].
            ratios_N: expected log-ratios of all rows.
            errors_N: their allowed errors.
            where: describes these references, for the message.

        Collectives: those of `Engine.evaluate`.
        """
        context, settings = self._context, self._context.recipe.dpo
        batches = [
            _with_reference(m.row.batch, reference)
            for m, reference in zip(measured, references, strict=True)
        ]
        result = context.engine.evaluate(batches, context.objective)
        tokens_N = np.concatenate([m.tokens for m in measured])
        nll_P = np.concatenate([m.chosen_nll for m in measured]) if settings.sft_weight else None
        # The largest effect that errors of the sums can have on the mean: all margins off in one
        # direction.
        apart_N = errors_N * np.where(np.arange(errors_N.size) % 2, -1.0, 1.0)
        low, loss, high = (
            mean_loss(ratios_N + sign * apart_N, tokens_N, settings, nll_P) for sign in (-1, 0, 1)
        )
        self._judge("loss", where, result.loss, loss, max(abs(low - loss), abs(high - loss)))
        name, beta = "rewards/margins", settings.beta
        if name in result.metrics:
            margin, error = beta * mean_margin(ratios_N), beta * mean_margin(apart_N)
            self._judge(name, where, result.metrics[name], margin, error)

    def _judge(self, what: str, where: str, got: float, expected: float, error: float) -> None:
        allowed = error + 1e-6 * max(1.0, abs(expected))
        # The numbers are equal on every rank, so either all raise or none does. NaN is refused too.
        if abs(got - expected) <= allowed:
            return
        settings = self._context.recipe.dpo
        raise DataError(
            f"start gate: {what} {where} is {got:.9g}, expected {expected:.9g} within "
            f"{allowed:.1g} (dpo.loss={settings.loss}, dpo.beta={settings.beta:g}); check the "
            f"objective and its sums over context ranks: {_REFUSED}"
        )

    def _together(self, check: Callable[[], None]) -> None:
        """Raise on every rank an error that a check finds on one of them."""
        error = None
        try:
            check()
        except (DataError, CheckpointError) as found:
            error = found
        raise_together(self._context.platform, error)

    def _record(self, outcome: dict[str, Any]) -> None:
        path = Path(self._context.recipe.run.dir) / GATE_FILE
        decided_by_writer(
            self._context.platform, lambda: write_atomically(path, msgspec.json.encode(outcome))
        )


def start_gate(context: RunContext) -> Sequence[Hook]:
    """Make the hook of stages with a start gate; see `HookFactory`."""
    return [StartGate(context)]


def _compare_repetition(rows: Sequence[ProbeRow], first: Sequence, again: Sequence) -> None:
    for row, one, other in zip(rows, first, again, strict=True):
        same = np.array_equal(one.labels, other.labels, equal_nan=True)
        if one.alternative_labels is not None:
            same &= np.array_equal(one.alternative_labels, other.alternative_labels, equal_nan=True)
        if not same:
            raise DataError(
                f"start gate: {row.describe(0)}: repeating the forward pass changed the "
                f"log-probabilities, expected identical bits; this layout is not deterministic: "
                f"{_REFUSED}"
            )


def _compare_with_cache(measured: Sequence[MeasuredRow]) -> None:
    for m in measured:
        _compare(
            m,
            m.reference,
            np.arange(m.sums.size),
            "in the reference cache",
            "the cache is stale, or was computed with another mask or other sides of the pair",
        )


def _compare(
    measured: MeasuredRow, expected: np.ndarray, segments: np.ndarray, where: str, reason: str
) -> None:
    """Raise an error for the first segment whose log-probability differs from the expected one."""
    differs = ~(np.abs(measured.sums - expected) <= measured.tolerance)
    wrong = segments[differs[segments]]
    if wrong.size:
        segment = int(wrong[0])
        raise DataError(
            f"start gate: {measured.row.describe(segment)}: log-probability "
            f"{measured.sums[segment]:.6f}, {where} {expected[segment]:.6f}; {reason}: {_REFUSED}"
        )


def _planted_ratios(num_segments: int) -> np.ndarray:
    """Return log-ratios that differ between sides and between pairs, [N]."""
    segment = np.arange(num_segments)
    pair = segment // 2
    return np.where(segment % 2, -0.75 - 0.25 * (pair % 2), 1.25 + 0.5 * (pair % 3))


def _with_reference(batch: Batch, reference_N: np.ndarray) -> Batch:
    return replace(batch, segment_extras={**batch.segment_extras, "reference": reference_N})
