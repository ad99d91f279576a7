"""A fault that would train on wrong sums is found before the first step, and named."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from phi4.config import DpoConfig
from phi4.data.stream.pair_source import PairSource
from phi4.data.stream.references import ReferenceCache
from phi4.data.stream.units import Rows
from phi4.engine import objective
from phi4.engine.engine import Engine
from phi4.engine.model import micro_batch
from phi4.engine.model.document_ranges import visible_keys
from phi4.engine.objective import Loss, LossInputs, SegmentSum
from phi4.rundir.names import GATE_FILE
from phi4.stages import dpo
from phi4.stages.dpo import PreferenceLoss
from phi4.stages.gate.losses import mean_loss
from tests.support import preference_runs
from tests.support.ranks import RankPool, pool_fixture

LOSSES = ("sigmoid", "sigmoid_norm", "ipo", "hinge")


pool = pool_fixture(1)


@pytest.fixture(scope="module")
def pair_of_ranks() -> Iterator[RankPool]:
    with RankPool(2) as ranks:
        yield ranks


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, pool: RankPool) -> Path:
    """A cache of the start model, and one of another model."""
    directory = tmp_path_factory.mktemp("gate")
    preference_runs.write_files(directory)
    pool.run(preference_runs.start, directory)
    pool.run(preference_runs.start, directory, "other", 2)
    other = ("data.reference_cache=stale", "dpo.reference=other")
    for overrides in ((), other):
        assert pool.run(preference_runs.cache, directory, overrides) == [""]
    return directory


def filled(change: Callable[[Rows], None]) -> AbstractContextManager:
    """Rows of pairs are changed after they are read."""
    fill = PairSource.fill

    def filled_wrongly(self: PairSource, unit: int, rows: Rows) -> None:
        fill(self, unit, rows)
        change(rows)

    return mock.patch.object(PairSource, "fill", filled_wrongly)


def shifted(by: int) -> Callable[[Rows], None]:
    """The loss covers other tokens than those of the answers."""

    def shift(rows: Rows) -> None:
        for column in (rows.weights, rows.pairs.segment_ids[0], rows.pairs.alternatives[0]):
            column[:] = np.roll(column, by)

    return shift


def swapped(rows: Rows) -> None:
    ids, labels, second = rows.pairs.segment_ids[0], rows.labels, rows.pairs.alternatives[0]
    pivots = second >= 0
    labels[pivots], second[pivots] = second[pivots], labels[pivots].copy()
    ids[(ids >= 0) & ~pivots] ^= 1


def end_twice(rows: Rows) -> None:
    ids = rows.pairs.segment_ids[0]
    ends = np.flatnonzero((ids >= 0) & (ids != np.append(ids[1:], -1)))
    rows.weights[ends] = 2


class BetaOnOneSide(PreferenceLoss):
    def __call__(self, inputs: LossInputs, segment_sum: SegmentSum) -> Loss:
        right = super().__call__(inputs, segment_sum)
        sums_N = dpo._log_probs(inputs, segment_sum)
        ratios_N = sums_N - inputs.segment_extras["reference"]
        margins_P = self.settings.beta * ratios_N[0::2] - ratios_N[1::2]
        return Loss(inputs.segment_total(-F.logsigmoid(margins_P)), right.weight_sum, right.metrics)


class SidesOfTheLossSwapped(PreferenceLoss):
    def __call__(self, inputs: LossInputs, segment_sum: SegmentSum) -> Loss:
        return super().__call__(inputs, lambda values: _turned(segment_sum(values)))


def _turned(values_N: torch.Tensor) -> torch.Tensor:
    return torch.stack([values_N[1::2], values_N[0::2]], dim=1).flatten()


def objective_of(kind: type[PreferenceLoss]) -> AbstractContextManager:
    return mock.patch("phi4.stages.dpo.PreferenceLoss", kind)


def another_pass_differs() -> AbstractContextManager:
    """The second pass over the same rows."""
    log_probs, calls = Engine.log_probs, []

    def drifting(self: Engine, batches: Sequence) -> list:
        found = log_probs(self, batches)
        calls.append(found)
        if len(calls) == 2:
            found[0].labels[0, 0] = np.nextafter(found[0].labels[0, 0], np.float32(0))
        return found

    return mock.patch.object(Engine, "log_probs", drifting)


def attention_leaks() -> AbstractContextManager:
    """Every document of a row sees those before it."""

    def visible(bounds: np.ndarray, num_rows: int, length: int, *rest: object) -> object:
        return visible_keys(np.arange(num_rows + 1) * length, num_rows, length, *rest)

    return mock.patch.object(micro_batch, "visible_keys", visible)


FAULTS: dict[str, Callable[[], AbstractContextManager]] = {
    "none": mock.MagicMock,
    "mask one late": lambda: filled(shifted(1)),
    "mask one early": lambda: filled(shifted(-1)),
    "swapped sides": lambda: filled(swapped),
    "EOS doubled": lambda: filled(end_twice),
    "stale cache": lambda: mock.patch.multiple(
        ReferenceCache, check_model=mock.DEFAULT, check_source=mock.DEFAULT
    ),
    "beta on one side": lambda: objective_of(BetaOnOneSide),
    "sides of the loss swapped": lambda: objective_of(SidesOfTheLossSwapped),
    "another pass differs": another_pass_differs,
    "attention leaks": attention_leaks,
    "a context rank missing in the sum": lambda: mock.patch.object(
        objective._SumOverRanks, "apply", lambda x, group: x
    ),
}


def run(rank: int, world_size: int, root: Path, fault: str, overrides: Sequence[str] = ()) -> str:
    """One rank of a run with a fault; its error."""
    with FAULTS[fault]():
        return preference_runs.run(rank, world_size, root, overrides)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("mask one late", ("pairs.bin, document", "the loss mask is shifted")),
        ("mask one early", ("pairs.bin, document", "the loss mask is shifted")),
        ("swapped sides", ("document", "in the reference cache")),
        ("EOS doubled", ("document", "in the reference cache")),
        ("beta on one side", ("loss at synthetic margins is", "dpo.beta=0.1")),
        ("sides of the loss swapped", ("loss", "dpo.loss=sigmoid")),
        ("another pass differs", ("repeating the forward pass",)),
        ("attention leaks", ("alone in a padded row", "packing, positions and the document mask")),
    ],
)
def test_fault_is_refused(
    fault: str, words: tuple[str, ...], root: Path, pool: RankPool, tmp_path: Path
) -> None:
    [error] = pool.run(run, root, fault, (f"run.dir={tmp_path}/run",))
    assert error.startswith("DataError: start gate: ") and len(error.splitlines()) == 1
    assert all(word in error for word in words), error
    assert not (tmp_path / "run" / GATE_FILE).exists()


def test_stale_cache_is_refused(root: Path, pool: RankPool, tmp_path: Path) -> None:
    overrides = (f"run.dir={tmp_path}/run", "data.reference_cache=stale")
    [error] = pool.run(run, root, "stale cache", overrides)
    assert "in the reference cache" in error and "the cache is stale" in error


def test_right_run_passes_and_says_so(root: Path, pool: RankPool, tmp_path: Path) -> None:
    assert pool.run(run, root, "none", (f"run.dir={tmp_path}/run",)) == [""]
    record = json.loads((tmp_path / "run" / GATE_FILE).read_bytes())
    assert record["outcome"] == "passed" and record["starts_from_reference"]
    assert record["rows"] == 2 and record["pairs"] > 2


def test_gate_that_is_skipped_is_recorded(root: Path, pool: RankPool, tmp_path: Path) -> None:
    overrides = (f"run.dir={tmp_path}/run", "dpo.gate=false", "run.steps=1")
    assert pool.run(run, root, "beta on one side", overrides) == [""]
    assert json.loads((tmp_path / "run" / GATE_FILE).read_bytes()) == {"outcome": "skipped"}


@pytest.mark.slow
@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_passes_with_another_reference(
    loss: str, root: Path, pool: RankPool, tmp_path: Path
) -> None:
    other = ("data.reference_cache=stale", "dpo.reference=other", "dpo.sft_weight=0.3")
    overrides = (f"run.dir={tmp_path}/run", f"dpo.loss={loss}", *other)
    assert pool.run(run, root, "none", overrides) == [""]
    record = json.loads((tmp_path / "run" / GATE_FILE).read_bytes())
    assert record["outcome"] == "passed" and not record["starts_from_reference"]


@pytest.mark.slow
def test_missing_context_rank_is_refused(
    root: Path, pair_of_ranks: RankPool, tmp_path: Path
) -> None:
    overrides = (f"run.dir={tmp_path}/run", "parallel.context=2")
    errors = pair_of_ranks.run(run, root, "a context rank missing in the sum", overrides)
    assert all("loss with the policy equal to the reference is" in error for error in errors)
    assert pair_of_ranks.run(run, root, "none", overrides) == ["", ""]


@pytest.mark.parametrize(
    ("settings", "margin", "expected"),
    [
        ({}, 6.0, 0.437488),
        ({}, 0.0, np.log(2)),
        ({"loss": "hinge"}, 6.0, 0.4),
        ({"loss": "ipo"}, 6.0, 1.0),
        ({"loss": "sigmoid_norm"}, 6.0, 0.437488),
        ({"label_smoothing": 0.25}, 6.0, 0.75 * 0.437488 + 0.25 * 1.037488),
    ],
)
def test_losses_by_hand(settings: dict, margin: float, expected: float) -> None:
    ratios_N, tokens_N = np.array([margin - 1.5, -1.5]), np.ones(2)
    assert mean_loss(ratios_N, tokens_N, DpoConfig(**settings)) == pytest.approx(expected, abs=1e-6)
