"""The generation engine's face: requests in, events out, on all ranks of a replica.

A replica is the tensor and pipeline ranks of one data and context rank. Its first rank leads: it is
given requests and cancels them. Before every step it sends what it was told since the last one to
the others, and all ranks then take the same step: a cancel that arrives in between cannot make
ranks differ.
"""

from collections.abc import Hashable
from dataclasses import dataclass

import torch.distributed as dist

from phi4.engine.engine import Engine
from phi4.engine.generation.blocks import BlockPool
from phi4.engine.generation.decode import Decoder
from phi4.engine.generation.request import GenerationRequest, check_request
from phi4.engine.generation.scheduler import Event, Scheduler, StepLimits


@dataclass(frozen=True)
class _Submit:
    request_id: int
    request: GenerationRequest


@dataclass(frozen=True)
class _Cancel:
    request_id: int
    sample: int | None


@dataclass(frozen=True)
class _Reload:
    weights_key: Hashable


@dataclass(frozen=True)
class _Close:
    pass


@dataclass(frozen=True)
class CacheSize:
    """Blocks of the cache on every rank, and the tokens of a block."""

    num_blocks: int
    block_tokens: int = 16


class Generator:
    """Continuous batching over one engine. A context, entered by all ranks of the replica.

    Args:
        engine: see `Decoder`.
        size: of the cache.
        weights_key: of the engine's weights; requests share prefixes under one key only.
        limits: of a step.
        num_ids: only ids below it are taken and drawn; the model's vocabulary without it.
    """

    def __init__(
        self,
        engine: Engine,
        size: CacheSize,
        weights_key: Hashable,
        *,
        limits: StepLimits | None = None,
        num_ids: int | None = None,
    ) -> None:
        model = engine.recipe.model
        self._decoder = Decoder(engine, size.num_blocks, size.block_tokens, num_ids)
        self._num_ids = num_ids or model.vocab_size
        self._max_positions = model.max_position_embeddings
        self._group = engine.layout.groups.mp
        self.leads = self._group.rank() == 0
        self.pool = BlockPool(size.num_blocks, size.block_tokens)
        self._scheduler = Scheduler(self.pool, limits or StepLimits(), weights_key)
        self._told: list[_Submit | _Cancel | _Reload | _Close] = []
        self._num_requests = 0
        self._closed = False

    def __enter__(self) -> "Generator":
        self._decoder.__enter__()
        return self

    def __exit__(self, *details: object) -> None:
        self._decoder.__exit__(*details)

    @property
    def is_idle(self) -> bool:
        """Whether a step would do nothing."""
        return not self._told and self._scheduler.is_idle

    def submit(self, request: GenerationRequest) -> int:
        """Queue a request, on the leader; its id: 0, 1, 2 and so on.

        Raises:
            ConfigError: the request is impossible; nothing is queued then.
        """
        check_request(request, self._num_ids, self._max_positions)
        self.pool.check_fits(len(request.prompt), request.n, request.max_tokens)
        self._told.append(_Submit(self._num_requests, request))
        self._num_requests += 1
        return self._num_requests - 1

    def cancel(self, request_id: int, sample: int | None = None) -> None:
        """End a sample, or the unfinished ones of a request, on the leader; see `Scheduler`."""
        self._told.append(_Cancel(request_id, sample))

    def reload(self, weights_key: Hashable) -> None:
        """Forget all prefixes, on the leader, after the weights have changed on all ranks.

        Raises:
            ValueError: requests are under way.
        """
        if not self.is_idle:
            raise ValueError("weights changed while requests are under way; finish or cancel them")
        self._told.append(_Reload(weights_key))

    def step(self) -> list[Event]:
        """Compute the next tokens; what happened since the last step, the same on all ranks.

        Collectives: one broadcast of what the leader was told over the replica's ranks; those of
            `Decoder.run`.
        """
        told = [self._told]
        self._told = []
        if self._group.size() > 1:
            dist.broadcast_object_list(told, group=self._group, group_src=0)
        for one in told[0]:
            self._apply(one)
        step = self._scheduler.plan()
        return self._scheduler.finish(self._decoder.run(step) if step.rows else ())

    def follow(self) -> None:
        """Take the leader's steps until it closes, on the other ranks."""
        while not self._closed:
            self.step()

    def close(self) -> None:
        """Let the other ranks return from `follow`, on the leader."""
        self._told.append(_Close())
        self.step()

    def _apply(self, told: _Submit | _Cancel | _Reload | _Close) -> None:
        match told:
            case _Submit(request_id, request):
                self._scheduler.submit(request_id, request)
            case _Cancel(request_id, sample):
                self._scheduler.cancel(request_id, sample)
            case _Reload(weights_key):
                self._scheduler.reload(weights_key)
            case _Close():
                self._closed = True
