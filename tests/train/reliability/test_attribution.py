"""Which ranks are named, from what each of them saw."""

import math

import pytest
import torch

from phi4.train.reliability.attribution import StepFinding, accused, differ, where_not_finite


def grid(**wrong: set[int]) -> list[StepFinding]:
    """Two replicas of two stages; the ranks for which a field is the other way round."""
    fields = {"loss_is_finite": True, "gradient_is_finite": True}
    fields |= dict.fromkeys(("loss_differs", "square_differs", "gradient_differs"), False)
    return [
        StepFinding(
            rank=rank,
            host=f"h{rank}",
            dp_rank=rank % 2,
            pp_rank=rank // 2,
            **{name: usual != (rank in wrong.get(name, set())) for name, usual in fields.items()},
        )
        for rank in range(4)
    ]


def test_loss_that_differs_accuses_its_whole_pipeline() -> None:
    assert accused(grid(loss_differs={3})) == ["rank 1 on h1", "rank 3 on h3"]


def test_gradient_that_differs_accuses_the_latest_stage_of_all_replicas() -> None:
    assert accused(grid(square_differs={0, 1})) == ["rank 0 on h0", "rank 1 on h1"]
    assert accused(grid(square_differs={0, 1, 2, 3})) == ["rank 2 on h2", "rank 3 on h3"]


def test_fault_that_comes_again_accuses_one_replica() -> None:
    found = grid(square_differs={0, 1, 2, 3}, gradient_differs={0, 2})
    assert accused(found) == ["rank 2 on h2"]


def test_what_is_not_finite_is_told_by_losses_first() -> None:
    everywhere = {0, 1, 2, 3}
    assert where_not_finite(grid()) == ""
    assert where_not_finite(grid(loss_is_finite={2}, gradient_is_finite=everywhere)) == (
        "it arose in the loss of rank 2 on h2"
    )
    assert where_not_finite(grid(gradient_is_finite={0, 1})) == (
        "it arose in the gradient of rank 0 on h0, rank 1 on h1"
    )


@pytest.mark.parametrize(
    ("one", "other", "within", "differs"),
    [
        (1.0, 1.0, 0.0, False),
        (1.0, 1.0 + 2**-52, 0.0, True),
        (1.0, 1.0 + 2**-52, 0.01, False),
        (1.0, 1.02, 0.01, True),
        (math.nan, math.nan, 0.0, False),
        (math.nan, 1.0, 0.01, True),
        (math.inf, math.inf, 0.01, False),
        (math.inf, 1.0, 0.01, True),
    ],
)
def test_what_of_two_results_counts_as_a_difference(one, other, within, differs) -> None:
    a, b = (torch.tensor([value], dtype=torch.float64) for value in (one, other))
    assert differ(a, b, within) == differs
