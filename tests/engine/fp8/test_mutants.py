"""The checks of FP8 linears reject an implementation with any one thing wrong.

A maximum of 447 is told from 448 by test_casts.py: random magnitudes do not.
"""

from functools import partial
from unittest import mock

import pytest

from phi4.engine.model.fp8 import linear_products
from phi4.engine.model.fp8.casts import FP8Matrix, cast_whole
from phi4.engine.model.fp8.linear_products import FP8Products
from phi4.engine.model.fp8.lost_values import Cast
from tests.engine.fp8 import test_linear, test_training
from tests.support.ranks import RankPool, pool_fixture

pytestmark = pytest.mark.slow

_BOTH, _WEIGHT_CASTS = FP8Products._both, FP8Products.weight_casts


def both_of_wrong_group(one: FP8Products, x_RK, of_row, of_column, what: Cast) -> object:
    return _BOTH(one, x_RK, of_row, of_row, what)


def cast_alone(x_RK, dtype, groups, implementation: str) -> tuple[FP8Matrix, FP8Matrix]:
    return cast_whole(x_RK, dtype, (), implementation)


def beside_its_scales(matrix: FP8Matrix) -> FP8Matrix:
    return FP8Matrix(matrix.data_RK.t().contiguous(), matrix.inverse.t().flip(0, 1))


def as_it_is(one: FP8Products, grad_TI, reduces: bool) -> object:
    return grad_TI


def cast_again(one: FP8Products) -> object:
    one.forget_weight()
    return _WEIGHT_CASTS(one)


def keep(one: FP8Products) -> None:
    pass


MUTANTS = {
    "none": (linear_products, "cast_whole", cast_whole),
    "amax of the wrong group": (FP8Products, "_both", both_of_wrong_group),
    "amax is not agreed on": (linear_products, "cast_whole", cast_alone),
    "scales are not transposed": (FP8Matrix, "transposed", beside_its_scales),
    "gradient is not reduced": (FP8Products, "reduced", as_it_is),
    "weight is cast twice": (FP8Products, "weight_casts", cast_again),
    "weight is not forgotten": (FP8Products, "forget_weight", keep),
}
"""What is replaced, by what."""
SCALING = {"scales are not transposed": "blockwise"}
"""Others are looked at tensorwise."""
OF_TRAINING = "weight is not forgotten"


pool = pool_fixture(2)


def run_mutated(mutant: str, *args: object) -> dict | None:
    with mock.patch.object(*MUTANTS[mutant]):
        return test_linear.run(*args)


def train_mutated(rank: int, world_size: int, mutant: str) -> test_training.Rank | None:
    with mock.patch.object(*MUTANTS[mutant]):
        return test_training.train(rank, world_size, test_training.of_recipe("tensorwise"), [])


def is_like_one_process(pool: RankPool, mutant: str) -> bool:
    recipe = f"precision.fp8_recipe={SCALING.get(mutant, 'tensorwise')}"
    alone = test_linear.found_on(pool, "linear_fc1", recipe)
    try:
        split = test_linear.found_on(
            pool,
            "linear_fc1",
            recipe,
            *test_linear.LAYOUTS["tp2"],
            in_rank=partial(run_mutated, mutant),
        )
        test_linear.check_like_one_process(split, alone)
    except AssertionError:
        return False
    return True


@pytest.mark.parametrize("mutant", [name for name in MUTANTS if name != OF_TRAINING])
def test_linear_with_one_thing_wrong_is_found(pool: RankPool, mutant: str) -> None:
    assert is_like_one_process(pool, mutant) is (mutant == "none")


@pytest.mark.parametrize("mutant", ["none", OF_TRAINING])
def test_training_with_one_thing_wrong_is_found(pool: RankPool, mutant: str) -> None:
    rank = pool.run(train_mutated, mutant)[0]
    try:
        test_training.check_counts([rank])
    except AssertionError:
        assert mutant != "none"
    else:
        assert mutant == "none"
