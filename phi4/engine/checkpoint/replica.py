"""Restore checkpoints from the hosts' replicas, collectively.

A restored checkpoint has the manifest that the run recorded when it became durable, and every byte
of it is hashed on the way. It is thus the checkpoint that was saved, and loads in any layout.
"""

import contextlib
import os
import secrets
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from phi4.engine.agreement import (
    decided_by_writer,
    gathered,
    raise_together,
    wait_until_visible,
)
from phi4.engine.checkpoint.host_views import (
    HostView,
    first_holder,
    present_files,
    views_of_replicas,
)
from phi4.engine.platform import Platform
from phi4.errors import CheckpointError, Phi4Error, PlatformError
from phi4.rundir import Lease
from phi4.rundir.bad_checkpoints import is_bad_content
from phi4.rundir.checkpoints import (
    CheckpointDirectory,
    checkpoint_name,
    checkpoints_dir,
    complete_checkpoints,
    step_of,
)
from phi4.rundir.manifest import (
    CheckpointManifest,
    FileEntry,
    entry_of,
    manifest_hash,
    parse_manifest,
    verify_files,
)
from phi4.rundir.names import MANIFEST_FILE, SAVES_FILE
from phi4.rundir.replica import ReplicaId, copy_verified
from phi4.rundir.roll_back import read_roll_back, still_counts
from phi4.rundir.save_log import counting_manifests

_SHOWN_NAMES = 4


@dataclass(frozen=True)
class Replicas:
    """The replicas of a run, as a source to restore checkpoints from; all methods are collective.

    Attributes:
        platform: this process.
        place: directory of the replicas on this rank's host; see
            `phi4.rundir.replica.replica_place`.
        run_dir: run directory of the run.
        lease: lease of the run on the writer rank, else None; a lost directory is not modified.
        say: prints one line.
        tick: called for every file.
    """

    platform: Platform
    place: Path
    run_dir: Path
    lease: Lease | None
    say: Callable[[str], None]
    tick: Callable[[], None] = lambda: None

    def restore_newer(self) -> None:
        """Restore the newest lost checkpoint of the run, if it is newer than all existing ones.

        If one cannot be restored, that is reported and the next one is tried.

        Raises:
            OwnershipError: the run directory was lost.
            CheckpointError: the newest rollback's file is damaged.

        Collectives: an all-gather of what the hosts hold, a broadcast of the candidates, and for
            each of them those of `_restored`.
        """
        views = views_of_replicas(self.platform, self.place)

        def decide() -> list[ReplicaId]:
            newest = max(map(step_of, complete_checkpoints(self._root)), default=-1)
            return self._eligible(views, lambda of: of.step > newest)

        candidates = decided_by_writer(self.platform, decide)
        for of in candidates:
            if self._restored(of, views):
                return

    def repair(self, checkpoint: Path) -> bool:
        """Replace a damaged checkpoint of the run, if the hosts and its intact files have all
        files.

        Returns:
            Whether it was replaced. If not, the missing files are reported.

        Raises:
            OwnershipError, CheckpointError: as `restore_newer`.

        Collectives: those of `restore_newer`.
        """
        views, step = views_of_replicas(self.platform, self.place), step_of(checkpoint)
        candidates = decided_by_writer(
            self.platform, lambda: self._eligible(views, lambda of: of.step == step)
        )
        if not candidates:
            self.say(f"no replica of step {step} can be used")
        return any(self._restored(of, views) for of in candidates)

    @property
    def _root(self) -> Path:
        return checkpoints_dir(self.run_dir)

    def _eligible(
        self, views: Sequence[HostView], asked: Callable[[ReplicaId], bool]
    ) -> list[ReplicaId]:
        """Return, on the writer, replicas that the run may resume from, newest first; report why
        others may not."""
        for problem in dict.fromkeys(view.problem for view in views if view.problem):
            self.say(problem)
        counting, roll_back = counting_manifests(self.run_dir), read_roll_back(self.run_dir)
        held = [held for view in views for held in view.held if asked(held.of)]
        states = {one.of: one.state for one in held if one.state is not None}
        eligible = []
        for of in sorted(states, key=lambda of: of.step, reverse=True):
            if is_bad_content(self._root, of.manifest_sha256):
                reason = "training from it became NaN too often"
            elif not still_counts(states[of], roll_back):
                reason = "a rollback undid it"
            elif counting.get(of.manifest_sha256) != of.step and not self._is_own(of):
                reason = f"{self.run_dir / SAVES_FILE} lists no such durable checkpoint"
            else:
                eligible.append(of)
                continue
            self.say(f"the replica of step {of.step} is not used: {reason}")
        return eligible

    def _is_own(self, of: ReplicaId) -> bool:
        """Return whether the run's directory still has the manifest."""
        return manifest_hash(self._root / checkpoint_name(of.step)) == of.manifest_sha256

    def _restored(self, of: ReplicaId, views: Sequence[HostView]) -> bool:
        """Restore one checkpoint; return False, and report why, if that is impossible.

        Collectives: all-gathers of the manifest, of the intact files, of who sees the new
        directory and of verdicts; two broadcasts of the writer's outcome; over all ranks.
        """
        holders = {
            name: [r for r, view in enumerate(views) if name in present_files(view, of)]
            for name in {name for view in views for name in present_files(view, of)}
        }
        try:
            content, manifest = self._manifest(of, views)
            intact = self._intact(of, manifest)
            missing = sorted(manifest.files.keys() - intact - holders.keys())
            if missing:
                raise CheckpointError(
                    f"{_listed(missing)} is neither on any host nor in {self._root}"
                )
            self._put_back(of, content, _shares(manifest, intact, holders, len(views)))
        except (CheckpointError, PlatformError) as error:
            self.say(f"step {of.step} cannot be restored from its replicas: {error}")
            return False
        lost = manifest.files.keys() - intact
        hosts = {views[rank].host for name in lost for rank in holders[name]}
        hosts.add(views[first_holder(of, views)].host)
        self.say(
            f"step {of.step} is restored from replicas on {', '.join(sorted(hosts))}: {len(lost)} "
            f"of its {len(manifest.files)} files were missing or damaged"
        )
        return True

    def _manifest(
        self, of: ReplicaId, views: Sequence[HostView]
    ) -> tuple[bytes, CheckpointManifest]:
        first = first_holder(of, views)
        path, own = self.place / of.name / MANIFEST_FILE, b""
        if self.platform.rank == first:
            with contextlib.suppress(OSError):
                own = path.read_bytes()
        content = gathered(self.platform, own)[first]
        if entry_of(content).sha256 != of.manifest_sha256:
            raise CheckpointError(f"{path} on {views[first].host} cannot be read again")
        return content, parse_manifest(content, path)

    def _intact(self, of: ReplicaId, manifest: CheckpointManifest) -> set[str]:
        """Return files of the manifest that the run's directory still has, each hashed by one
        rank."""
        checkpoint, found = self._root / checkpoint_name(of.step), []
        for name in sorted(manifest.files)[self.platform.rank :: self.platform.world_size]:
            self.tick()
            with contextlib.suppress(OSError):
                if not verify_files(checkpoint, manifest, [name]):
                    found.append(name)
        return {name for share in gathered(self.platform, found) for name in share}

    def _put_back(
        self, of: ReplicaId, manifest: bytes, shares: "Sequence[Sequence[_Piece]]"
    ) -> None:
        directory = CheckpointDirectory(self._root, of.step, tag=secrets.token_hex(4))
        directory = decided_by_writer(self.platform, lambda: self._begun(directory))
        try:
            wait_until_visible(self.platform, [directory.partial])
            raise_together(self.platform, self._copied(of, directory, shares))
            decided_by_writer(self.platform, lambda: directory.commit({}, manifest))
        except (CheckpointError, PlatformError):
            decided_by_writer(self.platform, directory.discard)
            raise

    def _begun(self, directory: CheckpointDirectory) -> CheckpointDirectory:
        if self.lease is not None:
            self.lease.check()
        directory.begin()
        return directory

    def _copied(
        self, of: ReplicaId, directory: CheckpointDirectory, shares: "Sequence[Sequence[_Piece]]"
    ) -> Phi4Error | None:
        """Copy this rank's share into the new directory; return the error, or None."""
        try:
            for piece in shares[self.platform.rank]:
                self.tick()
                source = directory.final if piece.is_intact else self.place / of.name
                target = directory.partial / piece.name
                target.parent.mkdir(parents=True, exist_ok=True)
                if not (piece.is_intact and _linked(source / piece.name, target)):
                    copy_verified(source / piece.name, target, piece.entry)
        except CheckpointError as error:
            return error
        except OSError as error:
            return PlatformError(f"rank {self.platform.rank} on {socket.gethostname()}: {error}")
        return None


@dataclass(frozen=True)
class _Piece:
    """A file to restore: from the run's directory if it is intact, else from a replica."""

    name: str
    entry: FileEntry
    is_intact: bool


def _shares(
    manifest: CheckpointManifest,
    intact: set[str],
    holders: Mapping[str, Sequence[int]],
    world_size: int,
) -> list[list[_Piece]]:
    """Return the files that each rank restores; a file is read by a rank whose host has it."""
    shares: list[list[_Piece]] = [[] for _ in range(world_size)]
    for index, (name, entry) in enumerate(sorted(manifest.files.items())):
        ranks = range(world_size) if name in intact else holders[name]
        shares[ranks[index % len(ranks)]].append(_Piece(name, entry, name in intact))
    return shares


def _linked(source: Path, target: Path) -> bool:
    """Return whether a hard link was made; not every file system supports them."""
    try:
        os.link(source, target)
    except OSError:
        return False
    return True


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_SHOWN_NAMES])
    more = len(names) - _SHOWN_NAMES
    return f"{shown} and {more} more" if more > 0 else shown
