"""Model of a Hopper multiprocessor for checking synchronisation: accesses, barriers, async work.

Partitions run as threads, one at a time, so a schedule is reproducible. Copies and warpgroup
products are asynchronous: the schedule decides when a copy lands, and a product completes when it
is waited for. The order of accesses is tracked by vector clocks, which barriers carry from arrivals
to waits: two unordered accesses are reported as a race, whether or not they collide in this
schedule.
"""

import random
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from phi4_kernels.errors import GateError
from phi4_kernels.testing.gluon.state import (
    Access,
    Barrier,
    Copy,
    Partition,
    Product,
    Region,
    merge,
)

_NEVER = 1 << 60
ORDERS = ("forward", "reversed", "shuffled")


@dataclass(frozen=True, slots=True)
class Schedule:
    """Chooses among several possible steps, and the order of programs."""

    order: str = "forward"
    """`forward` runs a partition until it waits, and lands copies when all wait; `reversed` takes
    the last partition and the newest copy first; `shuffled` draws every step."""
    seed: int = 0


class _ScheduleEndedError(BaseException):
    """Ends the threads of a failed machine."""


class Machine:
    """One program on one multiprocessor."""

    def __init__(self, schedule: Schedule, program: int, grid: int) -> None:
        self.program, self.grid = program, grid
        self.schedule, self._random = schedule, random.Random(schedule.seed * 7919 + program)
        # Before warp_specialize one partition runs, whose clock holds only its own time.
        self.partitions = [Partition(0, "kernel", {0: 1})]
        self.regions: list[Region] = []
        self._copies: list[Copy] = []
        self._agents = 1
        self._error: BaseException | None = None
        self._current = self.partitions[0]
        self._scheduler = threading.Semaphore(0)

    @property
    def current(self) -> Partition:
        """The partition that is running."""
        return self._current

    def read(self, region: Region, where: str, product: Product | None = None) -> None:
        """An ordinary read, or one by a product that is being issued."""
        me = self._current
        self._expect_written_before(region, f"{where} reads")
        # A product reads through the asynchronous proxy: ordinary stores must be fenced before it.
        if product is None:
            region.ordinary.append(Access(me.index, me.now, where, is_store=False))
        else:
            self._expect_fenced(region, where, loads=False)
            product.regions.append(region)
        # Until the product is waited for, nothing is ordered after its read.
        region.reads[me.index] = (_NEVER if product else me.now, f"{me.name} at {where}")

    def write(self, region: Region, where: str) -> None:
        """An ordinary store."""
        me = self._current
        self._expect_free(region, where)
        # Reads that a write is ordered after need not be kept.
        region.written, region.writer = (me.index, me.now), f"{me.name} at {where}"
        region.reads = {}
        region.ordinary.append(Access(me.index, me.now, where, is_store=True))

    def fence(self) -> None:
        """Order the ordinary accesses that happened before this fence before the asynchronous
        accesses that happen after it."""
        me = self._current
        for region in self.regions:
            for access in region.ordinary:
                # Only accesses that happened before the fence, not all that this schedule ran
                # before it.
                if me.knows(access.agent, access.time):
                    access.fences.append((me.index, me.now))

    def copy(
        self,
        region: Region,
        barrier: Barrier,
        num_bytes: int,
        land: Callable[[], object],
        where: str,
    ) -> None:
        """Issue a copy into a region."""
        me = self._current
        self._expect_free(region, where)
        self._expect_fenced(region, where, loads=True)
        self._expect_fenced(barrier.region, where, loads=True)
        # The copy is ordered after them, and the next access after the copy.
        region.ordinary = []
        # A copy is a separate agent: no partition determines when it lands.
        agent, self._agents = self._agents + 1000, self._agents + 1
        region.written, region.writer = (agent, 1), f"the copy that {me.name} issued at {where}"
        region.reads = {}
        # A wait for the copy's barrier is ordered after the copy and after its issuer's past.
        clock = dict(me.clock) | {agent: 1}
        self._copies.append(Copy(region, barrier, num_bytes, land, clock))
        self.step()

    def issue(self, product: Product) -> None:
        """Put a product in flight."""
        self._current.products.append(product)
        self.step()

    def wait_products(self, outstanding: int) -> None:
        """Finish all products of this partition but the newest `outstanding`."""
        me = self._current
        # Products of a warpgroup finish in order, so the oldest are done.
        finished = me.products[: len(me.products) - outstanding]
        me.products = me.products[len(finished) :]
        # A region may be read by several products; its read ends with the last of them.
        still = {id(region) for product in me.products for region in product.regions}
        for product in finished:
            product.done = True
            for region in product.regions:
                if me.index in region.reads and id(region) not in still:
                    region.reads[me.index] = (me.now, region.reads[me.index][1])
        self.step()

    def arrive(self, barrier: Barrier, count: int, where: str, num_bytes: int = 0) -> None:
        """Arrive, after adding to the bytes that the phase expects."""
        me = self._current
        # Two arrivals of one partition in a phase: one of them belongs to another phase.
        if me.index in barrier.arrived or barrier.pending < count:
            before = barrier.arrived.get(me.index, "others")
            raise GateError(
                f"{barrier.name}: {me.name} arrives at {where}, but phase {barrier.phases} already "
                f"has its arrival ({before}); expected {barrier.count} arrivals, one of each "
                "partition; remove one or correct mbarrier.init"
            )
        barrier.arrived[me.index] = where
        barrier.bytes += num_bytes
        barrier.pending -= count
        # A wait for the phase is ordered after this partition's past. The partition's time
        # advances, so that its next accesses are not included.
        merge(barrier.gathered, me.clock)
        me.clock[me.index] += 1
        barrier.settle()
        self.step()

    def wait(self, barrier: Barrier, parity: int, where: str) -> None:
        """Wait for the phase of that parity."""
        me = self._current
        me.waits = (barrier, parity, where)
        # A wait that passes switches partitions only if every step is random.
        if self.schedule.order == "shuffled" or not barrier.passes(parity):
            self._yield(me)
        me.waits = None
        # All arrivals of the phase happened before the next accesses.
        merge(me.clock, barrier.released)

    def step(self) -> None:
        """A point at which the schedule may switch partitions."""
        if self.schedule.order == "shuffled":
            self._yield(self._current)

    def specialize(self, functions: Sequence[tuple[str, Callable[[], object]]]) -> None:
        """Run partitions side by side until all have finished."""
        parent = self._current
        self.partitions = [
            # Partitions start after the accesses so far; the parent's time stays below theirs.
            Partition(i, name, dict(parent.clock) | {i: parent.now + 1})
            for i, (name, _) in enumerate(functions)
        ]
        threads = [
            threading.Thread(target=self._run, args=(partition, function), daemon=True)
            for partition, (_, function) in zip(self.partitions, functions, strict=True)
        ]
        for thread in threads:
            thread.start()
        # One step at a time, until all partitions are done or one fails.
        while self._error is None and not all(p.finished for p in self.partitions):
            self._next()
        # Wakes those that still wait: they see the error and end.
        for partition in self.partitions:
            partition.baton.release()
        for thread in threads:
            thread.join()
        if self._error is not None:
            raise self._error
        self._current = parent

    def finish(self) -> None:
        """Raise if anything is in flight when the program ends."""
        left = [f"the copy into {copy.region.name}" for copy in self._copies]
        left += [f"the product at {p.where}" for who in self.partitions for p in who.products]
        if left:
            raise GateError(
                f"the program ends with {left[0]} in flight; expected all awaited; wait for it"
            )

    def _run(self, partition: Partition, function: Callable[[], None]) -> None:
        # The scheduler resumes this partition; no other one runs meanwhile.
        partition.baton.acquire()
        try:
            if self._error is None:
                function()
        except _ScheduleEndedError:
            pass
        except BaseException as error:
            self._error = self._error or error
        partition.finished = True
        self._scheduler.release()

    def _yield(self, me: Partition) -> None:
        # No other partition can run: either the wait passes or it never will.
        if len(self.partitions) == 1:
            if me.waits is not None and not me.waits[0].passes(me.waits[1]):
                raise self._deadlock()
            return
        self._scheduler.release()
        me.baton.acquire()
        if self._error is not None:
            raise _ScheduleEndedError
        self._current = me

    def _next(self) -> None:
        """One step of the schedule: resume a partition, or land a copy."""
        ready = [p for p in self.partitions if p.ready]
        # Nothing can move: all that are not finished wait, and no copy is under way.
        choices: list[Any] = [*ready, *self._copies]
        if not choices:
            self._error = self._deadlock()
            return
        if self.schedule.order == "shuffled":
            chosen = self._random.choice(choices)
        elif self.schedule.order == "reversed":
            chosen = ready[-1] if ready else self._copies[-1]
        else:
            chosen = choices[0]
        try:
            if isinstance(chosen, Copy):
                self._land(chosen)
                return
        except GateError as error:
            self._error = error
            return
        self._current = chosen
        chosen.baton.release()
        self._scheduler.acquire()

    def _land(self, copy: Copy) -> None:
        self._copies.remove(copy)
        copy.land()
        # The copy's arrival is its bytes; the phase completes when none are missing.
        copy.barrier.bytes -= copy.num_bytes
        merge(copy.barrier.gathered, copy.clock)
        copy.barrier.settle()

    def _deadlock(self) -> GateError:
        waits = [
            f"{p.name} at {p.waits[2]} for parity {p.waits[1]} of {p.waits[0].name} "
            f"({p.waits[0].state()})"
            for p in self.partitions
            if p.waits is not None and not p.finished
        ]
        return GateError(
            f"deadlock: {'; '.join(waits)}; expected a partition or copy that can "
            "continue; look for a missing arrival, a wrong parity or a wrong number of bytes"
        )

    def _expect_written_before(self, region: Region, what: str) -> None:
        if region.written is None:
            raise GateError(
                f"{what} {region.name}, which nothing has written; expected a copy or a store"
            )
        if not self._current.knows(*region.written):
            raise GateError(
                f"race: {self._current.name} at {what} {region.name} unordered with "
                f"{region.writer}; expected a wait between them; check the barrier and its parity"
            )

    def _expect_free(self, region: Region, where: str) -> None:
        if region.written is not None:
            self._expect_written_before(region, f"{where} overwrites")
        for agent, (time, reader) in region.reads.items():
            if agent != self._current.index and not self._current.knows(agent, time):
                raise self._overwritten(region, where, reader)
            # Its own product, still in flight.
            if time == _NEVER:
                raise self._overwritten(region, where, reader)

    def _overwritten(self, region: Region, where: str, reader: str) -> GateError:
        return GateError(
            f"race: {self._current.name} at {where} overwrites {region.name}, which {reader} may "
            "still read; expected its release before; arrive after the read and wait for it"
        )

    def _expect_fenced(self, region: Region, where: str, *, loads: bool) -> None:
        """Raise unless a proxy fence orders the stores, and also `loads`, before this access."""
        for access in region.ordinary:
            is_fenced = any(self._current.knows(*fence) for fence in access.fences)
            if (access.is_store or loads) and not is_fenced:
                kind = "stored to" if access.is_store else "loaded from"
                raise GateError(
                    f"{where} uses {region.name} asynchronously, which {access.where} has {kind}; "
                    "expected fence_async_shared between them; add it after that access, before "
                    "the arrival that hands the memory on"
                )
