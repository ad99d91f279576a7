"""FP8 training in layouts: products are counted, and scales are those of one process.

Every step begins with one process' weights. Layouts that split no product (pipeline, data) then
have its scales bit for bit; the others sum in another order, which moves few scales, by one binade.
Left to themselves, trajectories part as any two do whose numbers were rounded to 3 bits.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from itertools import product
from typing import NamedTuple
from unittest import mock

import pytest
import torch

from phi4.engine.engine import Engine
from phi4.engine.model.fp8.layers import fp8_linears
from phi4.engine.model.fp8.linear_products import FP8Products
from phi4.engine.model.fp8.recipe import SCALINGS
from phi4.stages.pretrain import NextToken
from tests.support.engines import batches_of, engine_on, tiny_recipe
from tests.support.ranks import RankPool, pool_fixture

STEPS = 3
SIZES = (
    "model.num_layers=6",
    "model.hidden_size=128",
    "model.num_attention_heads=4",
    "model.num_key_value_heads=2",
    "model.intermediate_size=128",
    "batch.global_batch_size=8",
    "batch.micro_batch_size=2",
    "model.init_std=0.02",
    "precision.fp8=torch",
)
# Blocks of 128 are on a rank's part, too.
WIDE = (
    "model.hidden_size=256",
    "model.intermediate_size=256",
    "batch.global_batch_size=32",
    "batch.micro_batch_size=8",
)
FP8_LAYERS = 4
LINEARS = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")
MICRO_BATCHES = 4

_TP2, _PP2 = "parallel.tensor=2", "parallel.pipeline=2"
_DP2 = ("parallel.data=2", "parallel.distributed_optimizer=true")
LAYOUTS = {
    "tp2": (_TP2,),
    "tp2+sp": (_TP2, "parallel.sequence=true"),
    "pp2": (_PP2,),
    "pp2-vpp3": (_PP2, "parallel.virtual_pipeline=3", "parallel.overlap_p2p=true"),
    "cp2": ("parallel.context=2",),
    "dp2": _DP2,
    "dp2-overlapped": (
        *_DP2,
        "parallel.overlap_grad_reduce=true",
        "parallel.overlap_param_gather=true",
    ),
}
SPLITS_NO_PRODUCT = ("pp2", "pp2-vpp3", "dp2", "dp2-overlapped")
SPLIT_PRODUCTS = ("tp2", "tp2+sp", "cp2")
FAST = (
    *(("tensorwise", layout) for layout in ("pp2-vpp3", "dp2-overlapped")),
    ("rowwise", "tp2+sp"),
)
"""In `make test`; the others are slow."""


def cases(layouts: tuple[str, ...], scalings: Iterable[str]) -> list:
    return [
        pytest.param(*case, marks=() if case in FAST else pytest.mark.slow)
        for case in product(scalings, layouts)
    ]


Scales = dict[str, list[torch.Tensor]]
"""Of each cast, by layer, linear and kind: one tensor per micro-batch of each step, in order."""
Weights = list[dict[str, torch.Tensor]]
"""Whole parameters at the beginning of each step."""


class Rank(NamedTuple):
    """What a rank has seen.

    Attributes:
        scales: inverses of its casts.
        counts: (products, weight casts) of each of its FP8 linears.
        losses: of the steps.
        weights: that the steps began with.
        data_rank: of data_size; its micro-batches are every data_size-th.
        data_size: data ranks.
    """

    scales: Scales
    counts: list[tuple[int, int]]
    losses: list[float]
    weights: Weights
    data_rank: int
    data_size: int


pool = pool_fixture(2)


def train(rank: int, world_size: int, overrides: tuple[str, ...], given: Weights) -> Rank | None:
    """Each step begins with the weights given for it, as far as there are some."""
    with engine_on(rank, tiny_recipe(*SIZES, *overrides)) as engine:
        if engine is None:
            return None
        names, scales, losses, weights = named_linears(engine), defaultdict(list), [], []
        with recorded(lambda linear, kind, cast: scales[names[id(linear)] + kind].append(cast)):
            for step in range(STEPS):
                if given:
                    engine.load_whole_parameters(given[step])
                weights.append({k: v.clone() for k, v in engine.whole_parameters()})
                batches = batches_of(engine, step)
                losses.append(engine.train_step(batches, NextToken(), learning_rate=1e-3).loss)
        counts = [
            (one.counts.products, one.counts.weight_casts)
            for one in fp8_linears(engine.bare_chunks)
        ]
        layout = engine.layout
        return Rank(dict(scales), counts, losses, weights, layout.dp_rank, layout.dp_size)


def named_linears(engine: Engine) -> dict[int, str]:
    """Layer and name, by id, of the linears that multiply in FP8."""
    names = {}
    for chunk in engine.bare_chunks:
        for layer in chunk.decoder.layers:
            for name, module in layer.named_modules():
                if isinstance(module, FP8Products):
                    names[id(module)] = f"{layer.layer_number} {name} "
    return names


def recorded(record: Callable[[FP8Products, str, torch.Tensor], None]):
    """Have the scales of all casts told, while it is entered."""
    return mock.patch.multiple(FP8Products, **{name: watched(name, record) for name in KINDS})


KINDS = {"cast_input": "input", "cast_gradient": "gradient", "weight_casts": "weight"}


def watched(name: str, record: Callable) -> Callable:
    method, kind = getattr(FP8Products, name), KINDS[name]

    def call(linear: FP8Products, *args):
        casts_before = linear.counts.weight_casts
        pair = method(linear, *args)
        if kind != "weight" or linear.counts.weight_casts > casts_before:
            for index, one in enumerate(pair):
                record(linear, f"{kind} {index}", one.inverse.clone())
        return pair

    return call


@pytest.fixture(scope="module")
def alone(pool: RankPool) -> Callable[[str], Rank]:
    """One process, by its scaling."""
    made: dict[str, Rank] = {}

    def of(scaling: str) -> Rank:
        if scaling not in made:
            made[scaling] = pool.run(train, of_recipe(scaling), [])[0]
        return made[scaling]

    return of


def of_recipe(scaling: str) -> tuple[str, ...]:
    wide = WIDE if scaling == "blockwise" else ()
    return (*wide, f"precision.fp8_recipe={scaling}")


def paired(whole: Rank, rank: Rank) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """Key, this rank's scales of a cast, and one process' scales of the same cast."""
    for key, found in rank.scales.items():
        expected = whole.scales[key]
        own, per_step = len(found) // STEPS, len(expected) // STEPS
        for nth, scales in enumerate(found):
            step, micro_batch = divmod(nth, own)
            if own < per_step:
                micro_batch = micro_batch * rank.data_size + rank.data_rank
            yield key, scales, expected[step * per_step + micro_batch]


def on_ranks(pool: RankPool, whole: Rank, *overrides: str) -> list[Rank]:
    ranks = pool.run(train, overrides, whole.weights)
    return [rank for rank in ranks if rank is not None]


def check_counts(ranks: list[Rank], products_per_micro_batch: int = 3) -> None:
    """FP8 cannot be off unnoticed, and no weight is cast twice in a step."""
    for rank in ranks:
        micro_batches = STEPS * MICRO_BATCHES // rank.data_size
        assert set(rank.counts) == {(products_per_micro_batch * micro_batches, STEPS)}


@pytest.mark.parametrize("scaling", SCALINGS)
def test_one_process_counts_its_products(alone: Callable[[str], Rank], scaling: str) -> None:
    whole = alone(scaling)
    assert len(whole.counts) == FP8_LAYERS * len(LINEARS)
    check_counts([whole])
    assert whole.losses[-1] < whole.losses[0]


@pytest.mark.parametrize(("scaling", "layout"), cases(SPLITS_NO_PRODUCT, SCALINGS))
def test_layouts_that_split_no_product(
    pool: RankPool, alone: Callable[[str], Rank], scaling: str, layout: str
) -> None:
    whole = alone(scaling)
    ranks = on_ranks(pool, whole, *of_recipe(scaling), *LAYOUTS[layout])
    check_counts(ranks)
    if layout.startswith("pp"):
        assert sum(len(rank.counts) for rank in ranks) == FP8_LAYERS * len(LINEARS)
    assert {key for rank in ranks for key in rank.scales} == whole.scales.keys()
    for rank in ranks:
        assert rank.losses == pytest.approx(whole.losses, rel=1e-12)
        for key, found, expected in paired(whole, rank):
            assert torch.equal(found, expected), key


@pytest.mark.parametrize(("scaling", "layout"), cases(SPLIT_PRODUCTS, ("tensorwise", "rowwise")))
def test_layouts_that_split_products(
    pool: RankPool, alone: Callable[[str], Rank], scaling: str, layout: str
) -> None:
    """Sums in another order move few scales, and these to the next power of two."""
    whole, ratios = alone(scaling), []
    ranks = on_ranks(pool, whole, *of_recipe(scaling), *LAYOUTS[layout])
    check_counts(ranks)
    for rank in ranks:
        assert rank.scales.keys() == whole.scales.keys()
        # Rows of which a rank has a part are test_linear.py's.
        pairs = [(f, e) for _, f, e in paired(whole, rank) if f.shape == e.shape]
        ratios += [(found / expected).flatten() for found, expected in pairs]
        assert rank.losses == pytest.approx(whole.losses, rel=1e-3)
    all_ratios = torch.cat(ratios)
    moved = all_ratios[all_ratios != 1].tolist()
    assert len(moved) <= 1e-3 * len(all_ratios)
    assert all(ratio in (0.5, 2.0) for ratio in moved)


@pytest.mark.parametrize(
    ("granularity", "products"), [pytest.param("selective", 3, marks=pytest.mark.slow), ("full", 4)]
)
def test_recompute_of_a_layer_multiplies_once_more(
    pool: RankPool, alone: Callable[[str], Rank], granularity: str, products: int
) -> None:
    overrides = (*of_recipe("tensorwise"), f"recompute.granularity={granularity}")
    [rank] = on_ranks(pool, alone("tensorwise"), *overrides)
    check_counts([rank], products)
    assert rank.losses == alone("tensorwise").losses
