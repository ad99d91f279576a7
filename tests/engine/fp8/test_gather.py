"""Weights gathered in FP8 change nothing: no loss, norm, master, checkpoint or comparison, bitwise.

Weights begin with rows and columns binades apart, so that ranks' parts of a matrix have other
largest magnitudes, and small numbers are rounded by the scale.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallelConfig, param_and_grad_buffer

from phi4.engine import engine as engine_module
from phi4.engine.checkpoint import load_checkpoint, save_checkpoint, verify_checkpoint
from phi4.engine.engine import Engine
from phi4.engine.fp8_check import FP8Check, FP8Limits
from phi4.engine.model.fp8.layers import fp8_linears
from phi4.engine.optimizer import build, fp8_gather
from phi4.engine.optimizer.adamw import OnePassChain
from phi4.engine.optimizer.fp8_gather import FP8Bucket, FP8BucketGroup, message
from phi4.rundir.manifest import read_manifest
from phi4.stages.pretrain import NextToken
from tests.support.engines import batches_of, engine_on, tiny_recipe
from tests.support.ranks import RankPool, pool_fixture

RECIPE = (
    *("model.num_layers=4", "model.hidden_size=64", "model.num_attention_heads=4"),
    *("model.num_key_value_heads=2", "model.intermediate_size=128", "model.init_std=0.02"),
    *("precision.dtype=bf16", "precision.fp8=torch", "parallel.distributed_optimizer=true"),
    *("batch.global_batch_size=4", "batch.micro_batch_size=2"),
)
LEFT, SAVED = 2, 2
ON = "parallel.fp8_param_gather=true"
OVERLAPPED = ("parallel.overlap_grad_reduce=true", "parallel.overlap_param_gather=true")
DP2 = ("parallel.data=2",)
LAYOUTS = {
    "dp2 overlapped": (*DP2, *OVERLAPPED),
    "cp2": ("parallel.context=2",),
    "tp2 x dp2": (*DP2, "parallel.tensor=2"),
    "tp2+sp x dp2 overlapped": (*DP2, "parallel.tensor=2", "parallel.sequence=true", *OVERLAPPED),
    "pp2 x 2 chunks x dp2": (
        *(*DP2, "parallel.pipeline=2", "parallel.virtual_pipeline=2"),
        *("parallel.overlap_p2p=true", "batch.global_batch_size=8"),
    ),
}
FAST = ("dp2 overlapped", "tp2 x dp2")
BUCKET_NUMBERS = 20_000
"""About one layer in a bucket, where gathers overlap."""
LIMITS = FP8Limits(loss_gap=0.05, gradient_cosine=0.9, underflow=0.9, saturation=0.001)


_INIT, _SCALE, _UNPACK = FP8Bucket.__init__, FP8Bucket._agreed_scale, FP8Bucket.unpack
_MESSAGE, _BUCKETS = fp8_gather.message, FP8BucketGroup.fp8_buckets


def agreed_over_tensor_ranks_only(bucket: FP8Bucket, data, weights, group, tp_group) -> None:
    _INIT(bucket, data, weights, group, tp_group)
    bucket._sharing = [tp_group]


def agreed_over_data_ranks_only(bucket: FP8Bucket, data, weights, group, tp_group) -> None:
    _INIT(bucket, data, weights, group, tp_group)
    bucket._sharing = [group]


def of_another_weight(bucket: FP8Bucket) -> torch.Tensor:
    return _SCALE(bucket).roll(1)


def one_number_late(weights, shard: slice, element_bytes: int) -> list:
    late = [slice(one.start + 1, one.stop + 1) for one in weights]
    return _MESSAGE(late, shard, element_bytes)


def unpack_own(bucket: FP8Bucket, rows, inverse) -> None:
    others = bucket._data.clone()
    _UNPACK(bucket, rows, inverse)
    size = others.numel() // bucket._group.size()
    own = slice(bucket._group.rank() * size, (bucket._group.rank() + 1) * size)
    others[own] = bucket._data[own]
    bucket._data.copy_(others)


def keep(*_: object) -> None:
    pass


def as_laid_out_first(group: FP8BucketGroup) -> object:
    return _BUCKETS(group) if group._laid_out_for is None else group._laid_out


MUTANTS = {
    "amax is not agreed over data": (FP8Bucket, "__init__", agreed_over_tensor_ranks_only),
    "amax is not agreed over tensor": (FP8Bucket, "__init__", agreed_over_data_ranks_only),
    "scale of another weight": (FP8Bucket, "_agreed_scale", of_another_weight),
    "one number late": (fp8_gather, "message", one_number_late),
    "others are not unpacked": (FP8Bucket, "unpack", unpack_own),
    "masters are not written": (OnePassChain, "rewrite_weights", keep),
    "comparison reads rounded weights": (
        *(engine_module, "exact_parameters"),
        lambda *_: nullcontext(),
    ),
    "a layer that left is sent in FP8": (FP8BucketGroup, "fp8_buckets", as_laid_out_first),
}
"""What is replaced, by what."""
LAYOUT_OF = dict.fromkeys(
    ("amax is not agreed over tensor", "masters are not written"), "tp2 x dp2"
)
"""Others are looked at in data 2, overlapped."""


class Messages(NamedTuple):
    """Bytes of a rank's messages in a step.

    Attributes:
        sent: of every all-gather in FP8.
        expected: counted number by number.
    """

    sent: list[int]
    expected: list[int]


class Went(NamedTuple):
    """What a rank has seen.

    Attributes:
        numbers: loss and gradient norm of its steps, and the loss of evaluations between them.
        check: result of the comparison with bf16.
        masters: that it ends with, flat.
        weights: hashes of the weights it ends with.
        messages: of a step with all layers, and of one after a layer left FP8.
        repeated: gathers of a second evaluation of the same weights.
    """

    numbers: list[float]
    check: FP8Check
    masters: torch.Tensor
    weights: dict[str, str]
    messages: tuple[Messages, Messages]
    repeated: list[torch.Tensor]


pool = pool_fixture(4)


@pytest.fixture(scope="module")
def plain(pool: RankPool) -> Callable[[str], list[Went]]:
    """By layout: a run that gathers bf16."""
    return cache(lambda layout: trained(pool, *LAYOUTS[layout]))


@pytest.mark.parametrize(
    "layout",
    [pytest.param(one, marks=() if one in FAST else pytest.mark.slow) for one in LAYOUTS],
)
def test_training_is_the_same_bit_for_bit(
    pool: RankPool, plain: Callable[[str], list[Went]], layout: str
) -> None:
    in_fp8 = trained(pool, *LAYOUTS[layout], ON)
    check_same(in_fp8, plain(layout))
    for one in plain(layout):
        assert one.messages[0].sent == one.messages[1].sent == []
    for one in in_fp8:
        for messages in one.messages:
            assert sorted(messages.sent) == sorted(messages.expected)
        assert one.repeated == []
    # On some rank, even where a pipeline stage has no layer in FP8.
    full, fewer = (sum(sum(one.messages[at].sent) for one in in_fp8) for at in (0, 1))
    assert full > 0 and fewer != full


@pytest.mark.slow
@pytest.mark.parametrize("mutant", MUTANTS)
def test_gather_with_one_thing_wrong_is_found(
    pool: RankPool, plain: Callable[[str], list[Went]], mutant: str
) -> None:
    layout = LAYOUT_OF.get(mutant, "dp2 overlapped")
    in_fp8 = trained(pool, *LAYOUTS[layout], ON, mutant=mutant)
    with pytest.raises(AssertionError):
        check_same(in_fp8, plain(layout))


def test_checkpoint_has_the_bytes_of_one_without_it(pool: RankPool, tmp_path: Path) -> None:
    plain, in_fp8 = (
        saved(pool, tmp_path / name, first=0, overrides=overrides)
        for name, overrides in (("plain", ()), ("in_fp8", (ON,)))
    )
    # So is the step after the save.
    assert in_fp8.numbers == plain.numbers and in_fp8.files == plain.files
    resumed = saved(pool, tmp_path / "in_fp8", first=SAVED, overrides=())
    again = saved(pool, tmp_path / "plain", first=SAVED, overrides=(ON,))
    assert again.numbers == resumed.numbers == plain.numbers[SAVED:]


def test_message_covers_the_shard_and_weights_take_one_byte() -> None:
    weights = [slice(3, 10), slice(10, 30), slice(31, 40)]
    for shard in (slice(0, 16), slice(16, 32), slice(32, 48)):
        fields = message(weights, shard, element_bytes=2)
        covered = sorted(index for one in fields for index in range(48)[one.numbers])
        assert covered == list(range(48))[shard]
        end = 0
        for numbers, at, weight in fields:
            assert at.start == end
            end = at.stop
            size = numbers.stop - numbers.start
            assert at.stop - at.start == (2 * size if weight is None else size)
            if weight is not None:
                inside = weights[weight]
                assert inside.start <= numbers.start < numbers.stop <= inside.stop
        in_fp8 = sum(any(one.start <= at < one.stop for one in weights) for at in range(48)[shard])
        assert end == 2 * 16 - in_fp8


class Saved(NamedTuple):
    """A run of three steps, with a save after two of them or from that one.

    Attributes:
        numbers: loss and gradient norm by step.
        files: hashes of the checkpoint's files, without the index, which has an id of the save.
    """

    numbers: list[tuple[float, float]]
    files: dict[str, str]


def saved(pool: RankPool, root: Path, *, first: int, overrides: tuple[str, ...]) -> Saved:
    return pool.run(save, root, first, (*DP2, *overrides))[0]


def trained(pool: RankPool, *overrides: str, mutant: str = "") -> list[Went]:
    return [one for one in pool.run(train, overrides, mutant) if one is not None]


def check_same(in_fp8: list[Went], plain: list[Went]) -> None:
    for found, expected in zip(in_fp8, plain, strict=True):
        assert all(map(math.isfinite, found.numbers))
        assert found.numbers == expected.numbers
        assert found.check == expected.check
        assert torch.equal(found.masters, expected.masters)
        assert found.weights == expected.weights


# What follows runs in the ranks.


def train(rank: int, world_size: int, overrides: tuple[str, ...], mutant: str) -> Went | None:
    with ExitStack() as stack:
        enter = stack.enter_context
        small = partial(DistributedDataParallelConfig, bucket_size=BUCKET_NUMBERS)
        enter(mock.patch.object(build, "DistributedDataParallelConfig", small))
        if mutant:
            enter(mock.patch.object(*MUTANTS[mutant]))
        engine = enter(engine_on(rank, tiny_recipe(*RECIPE, *overrides)))
        if engine is None:
            return None
        spread_weights(engine)
        numbers = [*step(engine, 0)]
        more, all_layers = messages_of_step(engine, 1)
        numbers += more
        numbers.append(engine.evaluate(batches_of(engine, 1), NextToken()).loss)
        with watched_gathers(engine) as repeated:
            numbers.append(engine.evaluate(batches_of(engine, 1), NextToken()).loss)
        numbers += step(engine, 2)
        check = engine.check_fp8(batches_of(engine, 2), NextToken(), LIMITS)
        numbers += step(engine, 3)
        engine.leave_fp8([LEFT])
        numbers += step(engine, 4)
        more, after_left = messages_of_step(engine, 5)
        numbers += more
        masters = torch.cat([one.flatten() for one in masters_of(engine)])
        messages = all_layers, after_left
        return Went(numbers, check, masters, engine.weights_sha256(), messages, repeated)


def save(
    rank: int, world_size: int, root: Path, first: int, overrides: tuple[str, ...]
) -> Saved | None:
    with engine_on(rank, tiny_recipe(*RECIPE, *overrides)) as engine:
        if engine is None:
            return None
        checkpoint = root / f"step_{SAVED:07d}"
        if first:
            load_checkpoint(engine, checkpoint, verify_checkpoint(engine, checkpoint))
        numbers = []
        for index in range(first, SAVED + 1):
            if index == SAVED and not first:
                save_checkpoint(engine, root, SAVED, form="full", keep=9, files={}, data={})
            numbers.append(step(engine, index))
        files = read_manifest(checkpoint).files.items()
        return Saved(numbers, {name: one.sha256 for name, one in files if name != ".metadata"})


def spread_weights(engine: Engine) -> None:
    whole = {name: weight.clone() for name, weight in engine.whole_parameters()}
    for name, weight in whole.items():
        if "layers" in name and weight.dim() == 2:
            down, across = (torch.logspace(-2, 0.5, size) for size in weight.shape)
            weight *= down[:, None] * across
    engine.load_whole_parameters(whole)


def step(engine: Engine, index: int) -> tuple[float, float]:
    result = engine.train_step(batches_of(engine, index), NextToken(), learning_rate=1e-3)
    return result.loss, result.grad_norm


def masters_of(engine: Engine) -> Iterator[torch.Tensor]:
    for optimizer in engine.optimizer.chained_optimizers:
        yield from (master.detach().clone() for master in optimizer.owners)


def messages_of_step(engine: Engine, index: int) -> tuple[tuple[float, float], Messages]:
    with watched_gathers(engine) as parts:
        numbers = step(engine, index)
    sent = [part.numel() for part in parts if part.dtype is torch.uint8]
    return numbers, Messages(sent, list(expected_bytes(engine)))


@contextmanager
def watched_gathers(engine: Engine) -> Iterator[list[torch.Tensor]]:
    """What this rank sends in all-gathers over data and context ranks."""
    gather, parts = dist.all_gather_into_tensor, []

    def call(output: torch.Tensor, part: torch.Tensor, **options: object) -> object:
        if options["group"] is engine.layout.groups.dp_cp:
            parts.append(part.clone())
        return gather(output, part, **options)

    with (
        mock.patch.object(dist, "all_gather_into_tensor", call),
        mock.patch.object(param_and_grad_buffer, "dist_all_gather_func", call),
    ):
        yield parts


def expected_bytes(engine: Engine) -> Iterator[int]:
    """Of every bucket with FP8 weights: one byte for these numbers, two for others, of the shard
    that takes most; a multiple of 16."""
    weights = [one.weight for one in fp8_linears(engine.bare_chunks) if not one.is_plain]
    num_ranks = engine.layout.groups.dp_cp.size()
    for bucket in (
        bucket
        for chunk in engine.chunks
        for group in chunk.bucket_groups
        for bucket in group.buckets
    ):
        sizes = torch.full_like(bucket.param_data, 2, dtype=torch.int64)
        for weight in weights:
            if weight in bucket.params:
                first = (weight.data_ptr() - bucket.param_data.data_ptr()) // 2
                sizes[first : first + weight.numel()] = 1
        if (sizes == 1).any():
            yield -(-int(sizes.view(num_ranks, -1).sum(dim=1).max()) // 16) * 16
