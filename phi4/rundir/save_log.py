"""checkpoints.jsonl: the outcome of every save, one JSON object per event, in order of time.

All attempts append to it, and it is never truncated: saves of undone steps stay in it.
"""

import time
from pathlib import Path
from typing import Literal

import msgspec

from phi4.errors import DataError
from phi4.rundir.names import SAVES_FILE

SaveState = Literal["scheduled", "durable", "failed", "refused", "replicated", "not_replicated"]


class SaveEvent(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One line.

    Attributes:
        step: step of the checkpoint.
        state: scheduled for an asynchronous save, then durable or failed; refused if it was not
            begun because the content was not valid. After durable, with checkpoint.replica_dir:
            replicated once all hosts hold the second copy, or not_replicated.
        attempt: attempt of the run.
        unix_seconds: time of the event.
        optimizer_format: optimizer format of the checkpoint.
        seconds: time from its beginning until it was durable.
        stall_seconds: the part of it during which training was blocked.
        reason: reason for failed, refused or not_replicated.
        manifest_sha256: manifest sha256 of a durable checkpoint.
    """

    step: int
    state: SaveState
    attempt: int
    unix_seconds: float
    optimizer_format: str = ""
    seconds: float | None = None
    stall_seconds: float | None = None
    reason: str = ""
    manifest_sha256: str = ""


class SaveLog:
    """Writes a run's checkpoints.jsonl.

    If the disk is full, the run continues: the line is kept and written with the next one.

    Args:
        run_dir: run directory of the run.
        attempt: attempt of the run.
    """

    def __init__(self, run_dir: Path, attempt: int) -> None:
        self._path, self._attempt = run_dir / SAVES_FILE, attempt
        self._unwritten = b""

    def note(self, step: int, state: SaveState, **fields: object) -> None:
        """Append an event that happens now; fields as those of `SaveEvent`."""
        event = SaveEvent(step=step, state=state, attempt=self._attempt, unix_seconds=time.time())
        event = msgspec.structs.replace(event, **fields)
        self._unwritten += msgspec.json.encode(event) + b"\n"
        try:
            with self._path.open("ab", buffering=0) as file:
                # Start a new line after one that a kill or a full disk cut off.
                if file.tell() and not self._ends_a_line():
                    file.write(b"\n")
                written = file.write(self._unwritten)
            self._unwritten = self._unwritten[written:]
        except OSError:
            return

    def _ends_a_line(self) -> bool:
        with self._path.open("rb") as file:
            file.seek(-1, 2)
            return file.read() == b"\n"


def read_saves(run_dir: Path) -> list[SaveEvent]:
    """Read all events, in order; lines that a kill cut off are skipped.

    Raises:
        DataError: there is no such file.
    """
    path, found = run_dir / SAVES_FILE, []
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        raise DataError(f"{path} does not exist; give the directory of a run that saved") from None
    for line in lines:
        try:
            found.append(msgspec.json.decode(line, type=SaveEvent))
        except msgspec.DecodeError:
            continue
    return found


def counting_manifests(run_dir: Path) -> dict[str, int]:
    """Return the steps of durable checkpoints that were not superseded, by manifest hash.

    A checkpoint is superseded by one that became durable later with the same step or an earlier
    one: the run was rolled back or started over.
    """
    try:
        events = read_saves(run_dir)
    except DataError:
        return {}
    found: dict[str, int] = {}
    for event in events:
        if event.state == "durable":
            found = {digest: step for digest, step in found.items() if step < event.step}
            if event.manifest_sha256:
                found[event.manifest_sha256] = event.step
    return found
