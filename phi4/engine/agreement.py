"""Collective decisions: one rank reads the file system, and all ranks get its result.

Directory listings and file attributes on NFS and Lustre are cached per host, so two ranks that list
the same directory can see different files. Rank 0 looks; the others wait until its files are
visible to them too, with a deadline, and every failure is raised on all ranks together.
"""

import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar, cast

import torch
import torch.distributed as dist

from phi4.engine.platform import Platform
from phi4.errors import Phi4Error, PlatformError

VISIBILITY_SECONDS = 40.0
_POLL_SECONDS = 0.1

Answer = TypeVar("Answer")


class Asked(NamedTuple):
    """Requests of one rank at the end of a step, or their union over all ranks.

    The first three are requests to the run, the others report the save in progress.
    """

    requeue: bool = False
    """Save and end, to be resumed by the same command: from a notice, on any rank."""
    end: bool = False
    """Save and end for good: from a file, on the writer rank."""
    save: bool = False
    """Save and continue: from a file, on the writer rank."""
    save_is_busy: bool = False
    """This rank's part of the save is not finished."""
    save_failed: bool = False
    """This rank's part of the save failed, or takes too long."""

    @property
    def stops(self) -> bool:
        """Whether the run ends."""
        return self.requeue or self.end


def nothing_asked() -> Asked:
    """Return no requests, for a run that is not watched."""
    return Asked()


def asked_of_any(platform: Platform, asked: Asked) -> Asked:
    """Return the union of the requests of all ranks.

    Collectives: one all-reduce over all ranks of five numbers.
    """
    if platform.world_size == 1:
        return asked
    flags = torch.tensor(asked, dtype=torch.float32, device=platform.device)
    dist.all_reduce(flags)
    return Asked(*map(bool, flags.tolist()))


def decided_by_writer(platform: Platform, decide: Callable[[], Answer]) -> Answer:
    """Return the result of `decide` on the writer rank, on every rank.

    Args:
        platform: this process.
        decide: called on the writer rank only; its result must be picklable.

    Raises:
        Phi4Error: raised by `decide`; every rank raises the same type and message.

    Collectives: one broadcast of the result over all ranks, from rank 0.
    """
    answer: list[Answer | _Refusal | None] = [None]
    if platform.is_writer:
        try:
            answer = [decide()]
        except Phi4Error as error:
            answer = [_Refusal(error)]
        except OSError as error:
            answer = [_Refusal(PlatformError(f"rank 0 on {socket.gethostname()}: {error}"))]
    if platform.world_size > 1:
        dist.broadcast_object_list(answer, src=0, device=platform.device)
    (decided,) = answer
    if isinstance(decided, _Refusal):
        raise decided.error
    return cast("Answer", decided)


def done_by_all(platform: Platform, act: Callable[[], Answer]) -> Answer:
    """Return the result of `act` on this rank, after checking that no rank failed.

    Args:
        platform: this process.
        act: called on every rank; the files that it reads are expected to be the same for all.

    Raises:
        Phi4Error: raised by `act`, or a PlatformError for an OSError, of the lowest failing rank;
            where only some ranks failed, each is named with its host.

    Collectives: one all-gather of the errors over all ranks.
    """
    error: Phi4Error | None = None
    try:
        answer = act()
    except Phi4Error as failure:
        error = failure
    except OSError as failure:
        error = PlatformError(str(failure))
    where = f"rank {platform.rank} on {socket.gethostname()}"
    everyone = gathered(platform, (where, error))
    failed = [(where, error) for where, error in everyone if error is not None]
    if not failed:
        return answer
    lines = dict.fromkeys(
        str(error) if len(failed) == len(everyone) else f"{where}: {error}"
        for where, error in failed
    )
    raise type(failed[0][1])("; ".join(lines))


def raise_together(platform: Platform, error: Phi4Error | None) -> None:
    """Raise on every rank when at least one rank has an error.

    Args:
        platform: this process.
        error: this rank's error, or None.

    Raises:
        Phi4Error: of the type of the lowest failing rank, with the distinct messages of all ranks.

    Collectives: one all-gather of the errors over all ranks.
    """
    errors = [found for found in gathered(platform, error) if found is not None]
    if errors:
        lines = dict.fromkeys(str(found) for found in errors)
        raise type(errors[0])("; ".join(lines))


def wait_until_visible(
    platform: Platform, paths: Sequence[Path], *, seconds: float = VISIBILITY_SECONDS
) -> None:
    """Wait until this rank, and every other, sees the files or directories that rank 0 reported.

    Args:
        platform: this process.
        paths: paths that rank 0 saw, the same on every rank.
        seconds: how long a rank waits before it gives up.

    Raises:
        PlatformError: a rank does not see a path in time; names the rank, its host and the path.

    Collectives: one all-gather of the outcome over all ranks.
    """
    deadline = time.monotonic() + seconds
    missing = [path for path in paths if not path.exists()]
    while missing and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)
        missing = [path for path in missing if not path.exists()]
    error = None
    if missing:
        error = PlatformError(
            f"rank {platform.rank} on {socket.gethostname()} does not see {missing[0]} after "
            f"{seconds:.0f} s, but rank 0 does; use a directory that all hosts share"
        )
    raise_together(platform, error)


def gathered(platform: Platform, own: Answer) -> list[Answer]:
    """Return the value of every rank, by rank; values must be picklable.

    Collectives: one all-gather of it over all ranks.
    """
    if platform.world_size == 1:
        return [own]
    everyone = [own] * platform.world_size
    dist.all_gather_object(everyone, own)
    return everyone


class _Refusal:
    """An error as the result of a decision."""

    def __init__(self, error: Phi4Error) -> None:
        self.error = error
