"""The FP8 canary's comparison: the layer that FP8 harms is found, alike in every layout."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest

from phi4.engine.engine import Engine
from phi4.engine.fp8_deviation import Distance, FP8Check, FP8Limits
from phi4.stages.pretrain import NextToken
from tests.support.engines import batches_of, engine_on, tiny_recipe
from tests.support.fp8_plants import plant_hidden_outlier, plant_outlier
from tests.support.ranks import RankPool, pool_fixture

MODEL = (
    *("model.num_layers=4", "model.hidden_size=64", "model.num_attention_heads=4"),
    *("model.num_key_value_heads=2", "model.intermediate_size=128"),
)
FP8 = ("precision.fp8=torch", "precision.fp8_end_layers_in_bf16=1")
LIMITS = FP8Limits(loss_gap=0.05, gradient_cosine=0.9, underflow=0.5, saturation=0.001)
# The global batch has 8 rows; the first 4 are compared.
ALONE = ("batch.micro_batch_size=4",)
DP2 = ("parallel.data=2", "batch.micro_batch_size=2")
ZERO1 = ("parallel.distributed_optimizer=true", "parallel.overlap_grad_reduce=true")
LAYOUTS = {
    "tp2": (*ALONE, "parallel.tensor=2"),
    "tp2+sp": (*ALONE, "parallel.tensor=2", "parallel.sequence=true"),
    "pp2, full recompute": (*ALONE, "parallel.pipeline=2", "recompute.granularity=full"),
    "cp2": (*ALONE, "parallel.context=2"),
    "dp2": DP2,
    "dp2, distributed optimizer": (*DP2, *ZERO1, "parallel.overlap_param_gather=true"),
    "pp2 x 2 chunks": (
        *("parallel.pipeline=2", "parallel.virtual_pipeline=2", "parallel.overlap_p2p=true"),
        "batch.micro_batch_size=2",
    ),
}


pool = pool_fixture(2)


def healthy(_: Engine) -> None:
    pass


def outlier_in_layer_2(engine: Engine) -> None:
    plant_outlier(engine, 2)


def outlier_in_every_row(engine: Engine) -> None:
    plant_hidden_outlier(engine, 1, 2.0**18)


Plant = Callable[[Engine], None]
PLANTS: dict[str, dict[Plant, dict[int, str]]] = {
    "tensorwise": {healthy: {}, outlier_in_layer_2: {2: "underflow of weight"}},
    "rowwise": {
        healthy: {},
        outlier_in_every_row: {1: "with FP8 in this layer alone: gradient cosine"},
    },
}
"""By scaling: what is done to an engine one after the other, and which layers leave then."""


def checked(
    rank: int,
    world_size: int,
    overrides: tuple[str, ...],
    plants: Sequence[Plant] = (healthy,),
    limits: FP8Limits = LIMITS,
) -> list[FP8Check] | None:
    with engine_on(rank, tiny_recipe(*MODEL, *FP8, *overrides)) as engine:
        if engine is None:
            return None
        checks = []
        for plant in plants:
            plant(engine)
            checks.append(engine.check_fp8(batches_of(engine, 0), NextToken(), limits))
        return checks


def checks_of(pool: RankPool, *arguments) -> list[FP8Check]:
    """Of all ranks, which have the same."""
    first, *others = [one for one in pool.run(checked, *arguments) if one is not None]
    assert all(other == first for other in others)
    return first


@pytest.fixture(scope="module")
def alone(pool: RankPool) -> dict[str, list[FP8Check]]:
    """By scaling: what one process finds."""
    return {
        scaling: checks_of(pool, (*ALONE, f"precision.fp8_recipe={scaling}"), [*plants])
        for scaling, plants in PLANTS.items()
    }


@pytest.mark.parametrize("scaling", PLANTS)
def test_the_harmed_layer_and_no_other_leaves(
    alone: dict[str, list[FP8Check]], scaling: str
) -> None:
    for check, expected in zip(alone[scaling], PLANTS[scaling].values(), strict=True):
        assert check.fallbacks.keys() == expected.keys()
        assert all(check.fallbacks[layer].startswith(why) for layer, why in expected.items())
        assert list(check.lost) == [1, 2]
    distance, lost = alone[scaling][0].distance, alone[scaling][0].lost
    assert 0 < abs(distance.loss_gap) < 0.03
    # FP8 rounds, so it is not the same gradient.
    assert all(0.97 < cosine < 0.9999 for cosine in distance.gradient_cosines)
    assert not any(shares.saturation for by_cast in lost.values() for shares in by_cast.values())


FAST = (("tp2+sp", "rowwise"), ("dp2, distributed optimizer", "tensorwise"))


@pytest.mark.parametrize(
    ("layout", "scaling"),
    [
        pytest.param(layout, scaling, marks=() if (layout, scaling) in FAST else pytest.mark.slow)
        for scaling, layouts in (
            ("tensorwise", list(LAYOUTS)),
            ("rowwise", ["tp2+sp", "pp2, full recompute", "cp2"]),
        )
        for layout in layouts
    ],
)
def test_every_layout_decides_like_one_process(
    pool: RankPool, alone: dict[str, list[FP8Check]], layout: str, scaling: str
) -> None:
    overrides = (*LAYOUTS[layout], f"precision.fp8_recipe={scaling}")
    for got, single in zip(
        checks_of(pool, overrides, [*PLANTS[scaling]]), alone[scaling], strict=True
    ):
        assert got.fallbacks.keys() == single.fallbacks.keys()
        # Sums in another order move single numbers to the other side of a rounding in FP8.
        assert got.distance.loss_gap == pytest.approx(single.distance.loss_gap, abs=2e-3)
        cosines = single.distance.gradient_cosines
        assert got.distance.gradient_cosines == pytest.approx(cosines, abs=5e-3)
        # Gradients that are zero in one order are a last bit in another, which FP8 makes zero.
        for layer, by_cast in single.lost.items():
            for what, shares in by_cast.items():
                underflow = got.lost[layer][what].underflow
                assert underflow == pytest.approx(shares.underflow, abs=1e-2)


def test_layer_that_left_multiplies_as_without_fp8(pool: RankPool) -> None:
    [plain, *_] = pool.run(trained, ("precision.fp8=off",), ())
    assert pool.run(trained, FP8, (1, 2))[0] == plain
    assert pool.run(trained, FP8, (2,))[0] != plain


def trained(
    rank: int, world_size: int, overrides: tuple[str, ...], left: tuple[int, ...]
) -> list[float] | None:
    with engine_on(rank, tiny_recipe(*MODEL, *ALONE, *overrides)) as engine:
        if engine is None:
            return None
        engine.leave_fp8(left)
        return [step_of(engine, step) for step in range(3)]


def step_of(engine: Engine, step: int) -> float:
    return engine.train_step(batches_of(engine, step), NextToken(), learning_rate=1e-2).loss


@pytest.mark.parametrize(
    "layout",
    [pytest.param("pp2, full recompute", marks=pytest.mark.slow), "dp2, distributed optimizer"],
)
def test_training_does_not_notice_a_comparison(pool: RankPool, layout: str) -> None:
    with_one, without = (pool.run(interrupted, LAYOUTS[layout], is_on) for is_on in (True, False))
    assert with_one == without


def interrupted(
    rank: int, world_size: int, overrides: tuple[str, ...], is_on: bool
) -> tuple[list[float], dict[str, str]]:
    """Losses and weights of steps between which there are comparisons, or none."""
    losses = []
    with engine_on(rank, tiny_recipe(*MODEL, *FP8, *overrides)) as engine:
        for step in range(3):
            losses.append(step_of(engine, step))
            if is_on:
                # Once with a pass for every layer.
                limits = replace(LIMITS, gradient_cosine=0.99999) if step == 1 else LIMITS
                engine.check_fp8(batches_of(engine, step), NextToken(), limits)
        return losses, engine.weights_sha256()


def test_where_no_layer_alone_is_too_far_off_the_worst_leaves(
    pool: RankPool, alone: dict[str, list[FP8Check]]
) -> None:
    together = alone["tensorwise"][0].distance.least_cosine
    limits = replace(LIMITS, gradient_cosine=together + 1e-6)
    [check] = checks_of(pool, ALONE, (healthy,), limits)
    [reason] = check.fallbacks.values()
    assert "no layer exceeds the limit alone" in reason


def test_small_gradients_alone_take_no_layer_out(
    pool: RankPool, alone: dict[str, list[FP8Check]]
) -> None:
    lost = alone["rowwise"][0].lost.values()
    limit = max(by[what].underflow for by in lost for what in ("input", "weight"))
    assert all(by["gradient"].underflow > 10 * limit for by in lost)
    overrides = (*ALONE, "precision.fp8_recipe=rowwise")
    [check] = checks_of(pool, overrides, (healthy,), replace(LIMITS, underflow=2 * limit))
    assert check.fallbacks == {}
    [check] = checks_of(pool, overrides, (healthy,), replace(LIMITS, underflow=limit / 2))
    assert all("underflow of" in why for why in check.fallbacks.values()) and check.fallbacks


@pytest.mark.parametrize(
    ("distance", "wrong"),
    [
        (Distance(-0.01, (0.95, 1.0)), ""),
        (Distance(-0.06, (0.95, 1.0)), "loss gap -0.06"),
        (Distance(0.0, (0.85, 1.0)), "gradient cosine 0.850"),
        (Distance(0.0, (1.0, float("nan"))), "gradient cosine nan"),
        (Distance(float("nan"), (1.0,)), "loss gap nan"),
    ],
)
def test_limits_hold_the_loss_and_every_layers_gradient(distance: Distance, wrong: str) -> None:
    assert distance.beyond(LIMITS).startswith(wrong)
    assert bool(distance.beyond(LIMITS)) == bool(wrong) == (distance.excess(LIMITS) > 1)
