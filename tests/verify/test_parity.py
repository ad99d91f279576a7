"""Every layout equals one process, and the comparison turns red when a layout is wrong."""

import sys
from pathlib import Path

import numpy as np
import pytest

from phi4.engine.objective import Loss
from phi4.stages.pretrain import NextToken
from phi4.verify.layouts import LAYOUTS, cases, reference_case
from phi4.verify.parity import Comparison, compare, global_batch, micro_batches, run_case
from tests.support.engines import tiny_recipe
from tests.support.ranks import RankPool, rendezvous

BRIEF = (
    "recompute-full",
    "tp2+sp",
    "pp2-uneven",
    "pp4-vpp2",
    "cp2",
    "dp2-overlapped",
    "dp2xtp2",
    "tp2xcp2+sp-ring",
    "pp2xcp2-ring+recompute",
)
"""Every kind of parallelism, alone or with another."""
REST = tuple(name for name in LAYOUTS if name not in BRIEF)
"""What test-all runs besides; `make prove-parity` takes ten steps of all layouts."""

STEPS = 2


class MeanOfMeans(NextToken):
    """The classic mistake: every micro-batch counts alike, however many tokens it has."""

    def __call__(self, inputs, segment_sum):
        loss = super().__call__(inputs, segment_sum)
        weight = loss.weight_sum.clamp_min(1.0)
        return Loss(loss.loss_sum / weight, weight / weight)


def _run(
    rank: int, world_size: int, names: tuple[str, ...], steps: int, work_dir: Path, fault: str = ""
) -> None:
    from phi4.engine.platform import connect, disconnect

    if fault == "no norm all-reduce":
        finalize = sys.modules["megatron.core.distributed.finalize_model_grads"]
        finalize._allreduce_non_tensor_model_parallel_grads = lambda *_: None
    recipe = tiny_recipe()
    possible, _ = cases(recipe, names)
    reference = [] if (work_dir / "initial").exists() else [reference_case(recipe)]
    for case in [*reference, *possible]:
        meeting = rendezvous()
        if rank < case.world_size:
            platform = connect("cpu", rank=rank, world_size=case.world_size, rendezvous=meeting)
            objective = MeanOfMeans() if fault == "mean of means" else NextToken()
            run_case(case, platform, objective, steps=steps, work_dir=work_dir)
            disconnect()


def _compared(names: tuple[str, ...], work_dir: Path) -> list[Comparison]:
    recipe = tiny_recipe()
    possible, impossible = cases(recipe, names)
    assert not impossible
    return [compare(case, reference_case(recipe), work_dir) for case in possible]


def _run_layouts(names: tuple[str, ...], steps: int, directory: Path) -> Path:
    """Results of one process and of the layouts."""
    with RankPool(1) as pool:
        pool.run(_run, (), steps, directory)
    with RankPool(4) as pool:
        pool.run(_run, names, steps, directory)
    return directory


@pytest.fixture(scope="module")
def work_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _run_layouts(BRIEF, STEPS, tmp_path_factory.mktemp("parity"))


@pytest.fixture(scope="module")
def rest_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _run_layouts(REST, STEPS, tmp_path_factory.mktemp("parity_rest"))


@pytest.mark.parametrize("name", BRIEF)
def test_layout_equals_one_process(name: str, work_dir: Path) -> None:
    (result,) = _compared((name,), work_dir)
    assert result.passed, result


@pytest.mark.slow
@pytest.mark.parametrize("name", REST)
def test_the_other_layouts_equal_one_process(name: str, rest_dir: Path) -> None:
    (result,) = _compared((name,), rest_dir)
    assert result.passed, result


@pytest.mark.parametrize(
    ("fault", "name"), [("mean of means", "dp2"), ("no norm all-reduce", "tp2+sp")]
)
def test_wrong_reduction_is_found(fault: str, name: str, work_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "initial").symlink_to(work_dir / "initial")
    (tmp_path / "one_process").symlink_to(work_dir / "one_process")
    with RankPool(2) as pool:
        pool.run(_run, (name,), STEPS, tmp_path, fault)
    (result,) = _compared((name,), tmp_path)
    assert not result.passed, result


def test_batches_are_as_hard_as_promised() -> None:
    recipe = tiny_recipe("parallel.data=2", "parallel.context=2")
    tokens, mask = global_batch(recipe, 0)
    length = recipe.data.sequence_length
    assert (tokens[:, :-1] == 0).any(), "several documents in some row"
    counts = [
        batch.loss_mask.sum() for rank in (0, 1) for batch in micro_batches(recipe, 0, rank, 2)
    ]
    assert counts.count(0) == 1
    assert len(set(counts)) > 2
    inner = mask[:, length // 4 : 3 * length // 4].sum(1)
    assert inner[-1] == 0 < mask[-1].sum(), "one context rank of the last row has no token"


@pytest.mark.parametrize("dp_size", [1, 2])
@pytest.mark.parametrize("micro_batch_size", [1, 2, 4])
def test_first_micro_batch_of_every_data_rank_counts(dp_size: int, micro_batch_size: int) -> None:
    """Only there can a weight be met that the last update has not reached yet."""
    recipe = tiny_recipe(f"batch.micro_batch_size={micro_batch_size}")
    for dp_rank in range(dp_size):
        assert micro_batches(recipe, 0, dp_rank, dp_size)[0].loss_mask.any()


def test_micro_batches_of_all_data_ranks_are_the_global_batch() -> None:
    recipe = tiny_recipe("parallel.data=2")
    tokens, _ = global_batch(recipe, 3)
    served = [b.tokens for rank in (0, 1) for b in micro_batches(recipe, 3, rank, 2)]
    rows = {row.tobytes() for batch in served for row in batch}
    assert rows == {row.tobytes() for row in np.ascontiguousarray(tokens[:, :-1])}
