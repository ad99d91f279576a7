"""Every layout equals one process, and the comparison turns red when a layout is wrong."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from phi4.engine import objective
from phi4.engine.objective import Loss
from phi4.stages import stage_of
from phi4.stages.pretrain import NextToken
from phi4.verify.layouts import LAYOUTS, cases, reference_case
from phi4.verify.parity import Comparison, compare, global_batch, micro_batches, run_case
from tests.support.engines import tiny_recipe
from tests.support.ranks import RankPool, rendezvous

BRIEF = (
    "recompute-full",
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

DPO, SFT = ("run.stage=dpo", "dpo.sft_weight=0.1"), ("run.stage=sft",)
SMALL_DPO = (*DPO, "model.num_layers=2")
BRIEF_OF_DPO = ("dp2xtp2", "tp2xcp2+sp-ring")
"""Every kind of parallelism that splits a sum over pairs."""
REST_OF_STAGES = {
    DPO: tuple(LAYOUTS),
    # The loss of pretraining: only that the stage can be asked for is new.
    SFT: ("dp2xtp2", "tp2xcp2+sp-ring"),
}

STEPS = 2


class MeanOfMeans(NextToken):
    """The classic mistake: every micro-batch counts alike, however many tokens it has."""

    def __call__(self, inputs, segment_sum):
        loss = super().__call__(inputs, segment_sum)
        weight = loss.weight_sum.clamp_min(1.0)
        return Loss(loss.loss_sum / weight, weight / weight)


def _run(
    rank: int,
    world_size: int,
    names: tuple[str, ...],
    steps: int,
    work_dir: Path,
    fault: str = "",
    stage: tuple[str, ...] = (),
) -> None:
    from phi4.engine.platform import connect, disconnect

    if fault == "no norm all-reduce":
        finalize = sys.modules["megatron.core.distributed.finalize_model_grads"]
        finalize._allreduce_non_tensor_model_parallel_grads = lambda *_: None
    if fault == "sums of one context rank":
        objective._SumOverRanks.apply = lambda values, group: values
    recipe = tiny_recipe(*stage)
    possible, _ = cases(recipe, names)
    reference = [] if (work_dir / "initial").exists() else [reference_case(recipe)]
    for case in [*reference, *possible]:
        meeting = rendezvous()
        if rank < case.world_size:
            platform = connect("cpu", rank=rank, world_size=case.world_size, rendezvous=meeting)
            loss = stage_of(recipe).make_objective(recipe)
            if fault == "mean of means":
                loss = MeanOfMeans()
            run_case(case, platform, loss, steps=steps, work_dir=work_dir)
            disconnect()


def _compared(
    names: tuple[str, ...], work_dir: Path, stage: tuple[str, ...] = ()
) -> list[Comparison]:
    recipe = tiny_recipe(*stage)
    possible, impossible = cases(recipe, names)
    assert not impossible
    return [compare(case, reference_case(recipe), work_dir) for case in possible]


Run = Callable[..., Path]


@pytest.fixture(scope="module")
def run_layouts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """Runs one process and then the layouts, and gives the directory of their results."""
    with RankPool(1) as one, RankPool(4) as four:

        def run(names: tuple[str, ...], stage: tuple[str, ...] = ()) -> Path:
            directory = tmp_path_factory.mktemp("parity")
            one.run(_run, (), STEPS, directory, "", stage)
            four.run(_run, names, STEPS, directory, "", stage)
            return directory

        yield run


@pytest.fixture(scope="module")
def work_dir(run_layouts: Run) -> Path:
    return run_layouts(BRIEF)


@pytest.fixture(scope="module")
def rest_dir(run_layouts: Run) -> Path:
    return run_layouts(REST)


@pytest.fixture(scope="module")
def dpo_dir(run_layouts: Run) -> Path:
    return run_layouts(BRIEF_OF_DPO, SMALL_DPO)


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


@pytest.mark.parametrize("name", BRIEF_OF_DPO)
def test_layout_of_dpo_equals_one_process(name: str, dpo_dir: Path) -> None:
    (result,) = _compared((name,), dpo_dir, SMALL_DPO)
    assert result.passed, result


@pytest.mark.slow
@pytest.mark.parametrize("stage", REST_OF_STAGES)
def test_the_other_layouts_of_a_stage_equal_one_process(
    stage: tuple[str, ...], run_layouts: Run
) -> None:
    names = REST_OF_STAGES[stage]
    for result in _compared(names, run_layouts(names, stage), stage):
        assert result.passed, result


def test_part_of_a_sum_over_a_pair_is_missed(dpo_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "initial").symlink_to(dpo_dir / "initial")
    (tmp_path / "one_process").symlink_to(dpo_dir / "one_process")
    with RankPool(2) as pool:
        pool.run(_run, ("cp2",), STEPS, tmp_path, "sums of one context rank", SMALL_DPO)
    (result,) = _compared(("cp2",), tmp_path, SMALL_DPO)
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
