"""Check that run.dir is the same shared directory for all ranks, and writable by all."""

import secrets
import shutil
import socket
import time
from pathlib import Path

import torch.distributed as dist

from phi4.engine.agreement import VISIBILITY_SECONDS, decided_by_writer
from phi4.engine.platform import Platform
from phi4.verify.preflight_facts import existing_part

_POLL_SECONDS = 0.1


def shared_directory_trouble(
    platform: Platform, run_dir: Path, *, seconds: float = VISIBILITY_SECONDS
) -> str:
    """Return the problem that this rank has with it; empty if there is none.

    Rank 0 creates a directory at run.dir or its nearest existing parent, every rank writes a file
    there, and rank 0 must see it. The directory is removed again.

    Args:
        platform: this process.
        run_dir: directory that may not exist yet.
        seconds: how long a rank waits for another's file.

    Raises:
        PlatformError: rank 0 cannot write there; on every rank.

    Collectives: two broadcasts and one all-gather of short texts over all ranks.
    """

    def begin() -> Path:
        made = existing_part(run_dir) / f".phi4_preflight_{secrets.token_hex(8)}"
        made.mkdir()
        return made

    place = decided_by_writer(platform, begin)
    own = place / str(platform.rank)
    trouble = _written(own, seconds)
    troubles = [trouble] * platform.world_size
    if platform.world_size > 1:
        dist.all_gather_object(troubles, trouble)

    def unseen() -> list[int]:
        wrote = [rank for rank, text in enumerate(troubles) if not text]
        found = [rank for rank in wrote if not _appears(place / str(rank), seconds)]
        shutil.rmtree(place, ignore_errors=True)
        return found

    if platform.rank in decided_by_writer(platform, unseen):
        return f"wrote {own}, but rank 0 does not see it; run.dir needs a shared file system"
    return trouble


def _written(own: Path, seconds: float) -> str:
    try:
        if not _appears(own.parent, seconds):
            return (
                f"does not see {own.parent}, which rank 0 created; run.dir needs a shared file "
                f"system"
            )
        own.write_text(socket.gethostname())
    except OSError as error:
        return f"cannot write {own}: {error}"
    return ""


def _appears(path: Path, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not path.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL_SECONDS)
    return True
