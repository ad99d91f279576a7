"""The generation engine's public class: requests in, events out, on all ranks of a replica.

A replica is the tensor and pipeline ranks of one data and context rank. Its first rank is the
leader: it receives requests and cancellations. At the beginning of every step it sends the others
everything received since the last one, and all ranks then plan the same step: a cancellation that
arrives in between cannot make ranks differ.
"""

from collections import deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass

from phi4.engine.engine import Engine
from phi4.engine.generation.blocks import BlockPool
from phi4.engine.generation.decode import Decoder, Running
from phi4.engine.generation.events import Event
from phi4.engine.generation.orders import Cancel, Close, Load, Order, OrderRelay, Submit
from phi4.engine.generation.scheduler import Scheduler, StepLimits
from phi4.errors import CheckpointError, ConfigError
from phi4.model.generation_request import GenerationRequest, check_generation_request


@dataclass(frozen=True)
class CacheSize:
    """Number of cache blocks on every rank, and tokens per block."""

    num_blocks: int
    block_tokens: int = 16


class Generator:
    """Continuous batching over one engine. All ranks of the replica create one.

    It is a context manager: the leader closes it at exit, and the other ranks follow until then.

    Args:
        engine: see `Decoder`.
        size: size of the cache.
        weights_key: key of the engine's weights; prefixes are shared only under the same key.
        limits: limits of a step.
        num_ids: only ids below it are accepted and sampled; defaults to the model's vocabulary.
        batch_invariant: see `Decoder`; a chunk of a prompt is then computed in passes too.
        load_weights: called by `load` on every rank, to load weights into the engine. Its
            CheckpointError means that the weights are unchanged on all ranks.

    Raises:
        ConfigError: num_ids exceeds the model's vocabulary.
        LayoutError: see `Decoder`.

    Attributes:
        leads: whether this rank receives requests.
        pool: the blocks of the cache.
        num_ids: as above.
        max_sequence_tokens: longest sequence of the model.

    Collectives: those of `Decoder`.
    """

    def __init__(
        self,
        engine: Engine,
        size: CacheSize,
        weights_key: Hashable,
        *,
        limits: StepLimits | None = None,
        num_ids: int | None = None,
        batch_invariant: bool = False,
        load_weights: Callable[[str], None] | None = None,
    ) -> None:
        model = engine.recipe.model
        if (num_ids or 0) > model.vocab_size:
            raise ConfigError(
                f"the tokenizer has {num_ids} ids, but model.vocab_size={model.vocab_size}; use "
                f"the tokenizer used in training"
            )
        self._decoder = Decoder(
            engine, size.num_blocks, size.block_tokens, num_ids, batch_invariant=batch_invariant
        )
        self.num_ids = num_ids or model.vocab_size
        self.max_sequence_tokens = model.max_position_embeddings
        self._load_weights = load_weights
        self._relay = OrderRelay(engine.layout, engine.platform.device)
        self.leads = engine.layout.groups.mp.rank() == 0
        self.pool = BlockPool(size.num_blocks, size.block_tokens)
        self._scheduler = Scheduler(
            self.pool, limits or StepLimits(), weights_key, self._decoder.max_running
        )
        self._running: deque[Running] = deque()
        self._orders: list[Order] = []
        self._num_requests = 0
        self._closed = False

    def __enter__(self) -> "Generator":
        return self

    def __exit__(self, error_type: type | None, *_: object) -> None:
        # After an error the ranks may be inconsistent; then the process ends, and its launcher
        # reports it.
        if error_type is not None:
            return
        if self.leads:
            self.close()
        else:
            self.follow()

    @property
    def is_idle(self) -> bool:
        """Whether a step would do nothing."""
        return not self._orders and self._scheduler.is_idle

    @property
    def num_waiting(self) -> int:
        """Requests that are waiting for space in the cache."""
        return self._scheduler.num_waiting

    def submit(self, request: GenerationRequest) -> int:
        """Queue a request, on the leader; return its id: 0, 1, 2 and so on.

        Raises:
            ConfigError: the request is invalid; it is not queued.
        """
        check_generation_request(request, self.num_ids, self.max_sequence_tokens)
        self.pool.check_fits(len(request.prompt), request.n, request.max_tokens)
        self._orders.append(Submit(self._num_requests, request))
        self._num_requests += 1
        return self._num_requests - 1

    def cancel(self, request_id: int, sample: int | None = None) -> None:
        """End a sample, or the unfinished ones of a request, on the leader; see `Scheduler`."""
        self._orders.append(Cancel(request_id, sample))

    def load(self, place: str) -> None:
        """Load other weights on all ranks, and forget all prefixes; on the leader.

        Args:
            place: argument of `load_weights`, and the key of the weights from then on.

        Raises:
            ValueError: requests are in progress, or the generator was created without load_weights.
            CheckpointError: the weights are unchanged.

        Collectives: those of `OrderRelay`, of load_weights and of `Decoder.read_weights`; all
            replicas have to load together.
        """
        if self._load_weights is None:
            raise ValueError("the generator cannot load weights; create it with load_weights")
        self._check_idle()
        for order in self._relay.pass_on([Load(place)]):
            self._apply(order)

    def step(self) -> list[Event]:
        """Begin a step, and end the earliest one if as many are in flight as there are stages.

        Returns:
            Events since the last call, the same on all ranks.

        Collectives: those of `OrderRelay` and `Decoder`.
        """
        orders, self._orders = self._orders, []
        events: list[Event] = []
        for order in self._relay.pass_on(orders):
            events += self._apply(order)
        if self._closed:
            return events
        step = self._scheduler.plan()
        if step.rows:
            self._running.append(self._decoder.begin(step))
        is_full = len(self._running) == self._decoder.max_running
        if self._running and (is_full or not step.rows):
            events += self._scheduler.finish(self._decoder.end(self._running.popleft()))
        return events

    def follow(self) -> None:
        """Follow the leader's steps until it closes, on the other ranks."""
        while not self._closed:
            self.step()

    def close(self) -> None:
        """Let the other ranks return from `follow`, on the leader; end steps in flight.

        There must be no further requests. A second call does nothing.
        """
        if self._closed:
            return
        self._orders.append(Close())
        self.step()

    def _apply(self, order: Order) -> list[Event]:
        match order:
            case Submit(request_id, request):
                self._scheduler.submit(request_id, request)
            case Cancel(request_id, sample):
                return self._scheduler.cancel(request_id, sample)
            case Load(place):
                self._load(place)
            case Close():
                self._closed = True
                while self._running:
                    self._scheduler.finish(self._decoder.end(self._running.popleft()))
                self._relay.finish()
        return []

    def _check_idle(self) -> None:
        if not self.is_idle:
            raise ValueError(
                "weights changed while requests are in progress; finish or cancel them first"
            )

    def _load(self, place: str) -> None:
        assert self._load_weights is not None, "only a generator that was given it is asked"
        try:
            self._load_weights(place)
        except CheckpointError:
            # Every rank has the error, and the leader reports it.
            if self.leads:
                raise
            return
        self._decoder.read_weights()
        self._scheduler.reload(place)
