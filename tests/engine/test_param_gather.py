"""No parameter is read before its all-gather was waited for (overlap_param_gather).

An asynchronous collective may complete as late as its wait, and gloo's happens to be early. Here
the gather itself runs in the wait, and from the update until then what other ranks own is NaN.
Every parameter gets a bucket of its own: in a shared one, the wait for an earlier parameter hides a
missing wait for a later one.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from unittest import mock

import pytest
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallelConfig, param_and_grad_buffer

from phi4.engine.engine import Engine
from phi4.engine.model import layers
from phi4.engine.model.gpt import global_parameters
from phi4.engine.optimizer import build as optimizer
from phi4.engine.optimizer.adamw import OnePassDistributed
from phi4.stages.pretrain import NextToken
from tests.support.engines import batches_of, engine_on, tiny_recipe
from tests.support.ranks import pool_fixture

BucketGroup = param_and_grad_buffer._ParamAndGradBucketGroup
STEPS, NUM_LAYERS = 3, 2
RECIPE = (
    f"model.num_layers={NUM_LAYERS}",
    "parallel.data=2",
    "parallel.distributed_optimizer=true",
)
OVERLAP = ("parallel.overlap_grad_reduce=true", "parallel.overlap_param_gather=true")
FORMS = {
    "logits": (),
    "recompute": ("recompute.granularity=full", "loss_head.form=recompute"),
    "one pass": ("loss_head.form=one_pass",),
}


pool = pool_fixture(2)


@pytest.mark.parametrize("form", FORMS)
def test_late_gathers_change_nothing(pool, form):
    at_once = pool.run(train, FORMS[form])
    late = pool.run(train, (*FORMS[form], *OVERLAP))
    for found, expected in zip(late, at_once, strict=True):
        assert found["never waited for"] == []
        assert found["losses"] == expected["losses"]


def test_reading_a_weight_without_calling_its_module_is_found(pool):
    for found in pool.run(train, OVERLAP, True):
        norms = [f"decoder.layers.{layer}.pre_mlp_layernorm.weight" for layer in range(NUM_LAYERS)]
        assert found["never waited for"] == norms
        assert any(loss != loss for loss in found["losses"])


# What follows runs in the ranks.


def train(
    rank: int, world_size: int, overrides: tuple[str, ...], bypasses_modules: bool = False
) -> dict:
    """Losses of some steps and of an evaluation, and the parameters nobody waited for."""
    one_bucket_each = partial(DistributedDataParallelConfig, bucket_size=1)
    with ExitStack() as stack:
        enter = stack.enter_context
        enter(mock.patch.object(optimizer, "DistributedDataParallelConfig", one_bucket_each))
        enter(late_gathers())
        if bypasses_modules:
            enter(mock.patch.object(layers.AddRMSNorm, "__call__", layers.AddRMSNorm.forward))
        engine = enter(engine_on(rank, tiny_recipe(*RECIPE, *overrides)))
        losses = [
            engine.train_step(batches_of(engine, step), NextToken(), learning_rate=1e-2).loss
            for step in range(STEPS)
        ]
        # The gathers of the last update are still to come.
        losses.append(engine.evaluate(batches_of(engine, STEPS), NextToken()).loss)
        return {"losses": losses, "never waited for": outstanding(engine)}


@contextmanager
def late_gathers() -> Iterator[None]:
    """Gathers that overlap the forward pass happen when they are waited for, and not before."""
    start, update = BucketGroup.start_param_sync, OnePassDistributed.update

    def start_late(self: BucketGroup, force_sync: bool = False) -> None:
        if force_sync or not self.ddp_config.overlap_param_gather:
            start(self, force_sync)
            return
        self.param_gather_handle = LateGather(self)
        self.param_gather_dispatched = True

    def update_and_poison(self: OnePassDistributed, *arguments: object) -> None:
        update(self, *arguments)
        if self.ddp_config.overlap_param_gather:
            for chunk in self.model_chunks:
                for buckets in chunk.bucket_groups:
                    poison(buckets)

    with (
        mock.patch.object(BucketGroup, "start_param_sync", start_late),
        mock.patch.object(OnePassDistributed, "update", update_and_poison),
    ):
        yield


def poison(buckets: BucketGroup) -> None:
    """Make NaN of what other data ranks have to send."""
    for bucket in buckets.buckets:
        for owner, shard in enumerate(shards_of(buckets, bucket)):
            if owner != buckets.intra_distributed_optimizer_instance_rank:
                shard.fill_(float("nan"))


class LateGather:
    """The handle of a gather that has not begun."""

    def __init__(self, buckets: BucketGroup) -> None:
        self.buckets = buckets

    def wait(self) -> None:
        """Gather now. Collectives: one all-gather over data ranks per bucket."""
        group = self.buckets.intra_distributed_optimizer_instance_group
        for bucket in self.buckets.buckets:
            own = shards_of(self.buckets, bucket)[dist.get_rank(group)].clone()
            dist.all_gather_into_tensor(bucket.param_data, own, group=group)


def shards_of(buckets: BucketGroup, bucket) -> list:
    size = buckets.intra_distributed_optimizer_instance_size
    return param_and_grad_buffer.shard_buffer(bucket.param_data, size)


def outstanding(engine: Engine) -> list[str]:
    """Parameters that a whole forward pass has left waiting, by global name."""
    names = {parameter: name for name, parameter in global_parameters(engine.bare_chunks)}
    return sorted(
        names[parameter]
        for chunk in engine.chunks
        for buckets in chunk.bucket_groups
        for bucket in buckets.buckets
        for parameter in bucket.params
        if buckets.param_gather_handle is not None
    )
