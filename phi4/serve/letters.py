"""Messages from the model's thread to the clients on the server's event loop."""

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import NamedTuple

from phi4.sampling.protocol import Event, Request
from phi4.serve.api_errors import ApiError


class Letter(NamedTuple):
    """An event of one of the requests that were submitted together."""

    place: int
    content: Sequence[Event] | ApiError
    is_last: bool


@dataclass(eq=False)
class AskedRequest:
    """A request in progress.

    Attributes:
        index: index among the requests submitted together.
        mailbox: queue of all of those; only the loop uses it.
        num_left: samples that have not ended.
        asked_at: submission time of the monotonic clock, in seconds.
        token_at: time of each sample's last token.
        is_abandoned: whether nothing reads the mailbox any more.
        is_cancelled: whether the sampler was told to cancel it.
    """

    index: int
    request: Request
    loop: asyncio.AbstractEventLoop
    mailbox: asyncio.Queue[Letter]
    num_left: int
    asked_at: float
    token_at: dict[int, float] = field(default_factory=dict)
    is_abandoned: bool = False
    is_cancelled: bool = False


def post(letters: Sequence[tuple[AskedRequest, Letter]]) -> None:
    """Deliver letters to their loops, all of a loop in one call."""
    by_loop: dict[asyncio.AbstractEventLoop, list[tuple[AskedRequest, Letter]]] = {}
    for one, letter in letters:
        if not one.is_abandoned:
            by_loop.setdefault(one.loop, []).append((one, letter))
    for loop, wanted in by_loop.items():
        # A closed loop has no clients any more.
        with suppress(RuntimeError):
            loop.call_soon_threadsafe(_put_all, wanted)


def _put_all(letters: Sequence[tuple[AskedRequest, Letter]]) -> None:
    for one, letter in letters:
        one.mailbox.put_nowait(letter)
