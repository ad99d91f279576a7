"""Forward the leader's orders to the other ranks of a replica.

Orders are sent from stage to stage like hidden states: a broadcast over all ranks would make every
stage wait for the last one.
"""

import pickle
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from phi4.engine.layout import Layout
from phi4.model.generation_request import GenerationRequest


@dataclass(frozen=True)
class Submit:
    """Queue a request."""

    request_id: int
    request: GenerationRequest


@dataclass(frozen=True)
class Cancel:
    """End a sample, or all of a request."""

    request_id: int
    sample: int | None


@dataclass(frozen=True)
class Load:
    """Load other weights from a path that every rank can read."""

    place: str


@dataclass(frozen=True)
class Close:
    """No further step."""


Order = Submit | Cancel | Load | Close


class OrderRelay:
    """Sends messages from the leader to all ranks of its replica.

    Args:
        layout: layout of the engine.
        device: device that messages are sent from.
    """

    def __init__(self, layout: Layout, device: torch.device) -> None:
        self._layout, self._device = layout, device
        self._sent: list[tuple[dist.Work | None, torch.Tensor]] = []

    def pass_on(self, orders: Sequence[Order]) -> Sequence[Order]:
        """Return the leader's orders, on every rank.

        Args:
            orders: orders on the leader; ignored elsewhere.

        Collectives: on the first stage one broadcast over tp, then one send over pp per stage
            border: 8 bytes, and a second message with the orders where there are any.
        """
        layout = self._layout
        if layout.tp_size == layout.pp_size == 1:
            return orders
        # Only ranks of this replica write what is unpickled here.
        content = pickle.dumps(list(orders)) if orders else b""
        size = self._passed(torch.tensor([len(content)], device=self._device))
        if not int(size):
            return ()
        if len(content) != int(size):
            content = bytes(int(size))
        payload = torch.frombuffer(bytearray(content), dtype=torch.uint8).to(self._device)
        return pickle.loads(self._passed(payload).cpu().numpy().tobytes())

    def finish(self) -> None:
        """Wait until everything has arrived: a message that is released before may never arrive."""
        while self._sent:
            work, _ = self._sent.pop()
            if work is not None:
                work.wait()

    def _passed(self, message: torch.Tensor) -> torch.Tensor:
        """Return the leader's message."""
        tp, pp, rank = self._layout.groups.tp, self._layout.groups.pp, self._layout.pp_rank
        if rank == 0 and self._layout.tp_size > 1:
            dist.broadcast(message, group=tp, group_src=0)
        if rank > 0:
            dist.recv(message, group=pp, group_src=rank - 1)
        if not self._layout.is_last_stage:
            self._sent = [one for one in self._sent if one[0] and not one[0].is_completed()]
            work = dist.isend(message, group=pp, group_dst=rank + 1)
            self._sent.append((work, message))
        return message
