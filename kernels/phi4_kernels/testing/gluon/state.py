"""State of the emulated multiprocessor: slots of shared memory, barriers, work in flight."""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from phi4_kernels.errors import GateError

Clock = dict[int, int]
"""Vector clock: per agent (a partition or a copy), the latest time known to have happened."""


def merge(into: Clock, other: Clock) -> None:
    """Merge the clock `other` into `into`."""
    for agent, time in other.items():
        # The pointwise maximum covers both.
        into[agent] = max(into.get(agent, 0), time)


@dataclass(slots=True)
class Access:
    """An ordinary load or store, which the copy engine and the tensor cores do not wait for."""

    agent: int
    time: int
    where: str
    is_store: bool
    fences: list[tuple[int, int]] = field(default_factory=list)
    """Agents and times of the proxy fences that come after it."""


@dataclass(slots=True)
class Region:
    """A slot of shared memory: its last writer and the readers since then."""

    name: str
    written: tuple[int, int] | None = None
    writer: str = ""
    reads: dict[int, tuple[int, str]] = field(default_factory=dict)
    ordinary: list[Access] = field(default_factory=list)
    """Since the last copy into it."""


@dataclass(slots=True)
class Barrier:
    """An mbarrier; see the PTX manual, section mbarrier."""

    region: Region
    count: int
    pending: int
    bytes: int = 0
    """Expected and not yet landed."""
    phases: int = 0
    """Completed."""
    arrived: dict[int, str] = field(default_factory=dict)
    gathered: Clock = field(default_factory=dict)
    released: Clock = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.region.name

    def passes(self, parity: int) -> bool:
        """Whether a wait for `parity` returns."""
        # As mbarrier.try_wait.parity: the phase of that parity is complete, so the next has begun.
        return self.phases % 2 != parity

    def settle(self) -> None:
        """Complete the phase if nothing is missing."""
        if self.pending:
            return
        # More bytes than announced complete a phase too early on the machine.
        if self.bytes < 0:
            raise GateError(
                f"{self.name}: {-self.bytes} bytes landed that were not expected in phase "
                f"{self.phases}; expected the bytes of its copies; correct mbarrier.expect"
            )
        if self.bytes == 0:
            # Kept over the phases: a later wait is ordered after the earlier phases, too.
            merge(self.released, self.gathered)
            self.gathered, self.arrived = {}, {}
            self.phases, self.pending = self.phases + 1, self.count

    def state(self) -> str:
        """Missing arrivals and bytes of the current phase."""
        return f"phase {self.phases} lacks {self.pending} arrivals and {self.bytes} bytes"


@dataclass(slots=True)
class Copy:
    """A copy in flight."""

    region: Region
    barrier: Barrier
    num_bytes: int
    land: Callable[[], object]
    clock: Clock


@dataclass(slots=True)
class Product:
    """A warpgroup product in flight, and the regions it reads."""

    regions: list[Region]
    where: str
    done: bool = False


@dataclass(slots=True)
class Partition:
    """A group of warps."""

    index: int
    name: str
    clock: Clock
    products: list[Product] = field(default_factory=list)
    waits: tuple[Barrier, int, str] | None = None
    finished: bool = False
    baton: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))

    @property
    def now(self) -> int:
        return self.clock[self.index]

    def knows(self, agent: int, time: int) -> bool:
        """Whether that access happened before whatever this partition does next."""
        return self.clock.get(agent, 0) >= time

    @property
    def ready(self) -> bool:
        """Whether it can continue."""
        if self.finished:
            return False
        return self.waits is None or self.waits[0].passes(self.waits[1])
