"""about/0000001.json: metadata of an attempt of a run, written when it starts.

For people who look up a run: in MLflow, in a report, by grep. Training does not depend on it.
"""

import re
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from phi4.config.schema import key_kinds
from phi4.data.files.atomic_files import write_atomically
from phi4.rundir.launched_by import LaunchedBy
from phi4.rundir.names import ABOUT_DIR

_NAME = re.compile(r"(\d{7,})\.json")


class SourceTree(msgspec.Struct, frozen=True):
    """The git checkout that a program runs from."""

    commit: str
    is_dirty: bool
    """Whether files that git tracks differ from the commit."""


class AboutSource(msgspec.Struct, frozen=True, kw_only=True):
    """A data source as an attempt found it.

    Attributes:
        name: name of the source in the recipe.
        path: absolute; a prefix, a glob of prefixes or a list file.
        kind: kind in the recipe.
        weight: weight in the recipe.
        sha256: hash of its content, independent of its path.
        num_tokens: tokens in its files.
        num_documents: documents in its files.
        num_shards: pairs of files.
    """

    name: str
    path: str
    kind: str
    weight: float
    sha256: str
    num_tokens: int
    num_documents: int
    num_shards: int


class Origins(msgspec.Struct, frozen=True):
    """Absolute paths of what a run takes from other runs; empty where it takes nothing.

    Attributes:
        init_from: checkpoint or run of its initial weights.
        weights: the exact checkpoint of the initial weights.
        weights_manifest_sha256: hash of that checkpoint's manifest.
        continue_from: checkpoint or run of its data ledger.
        reference: reference model of a preference run.
    """

    init_from: str = ""
    weights: str = ""
    weights_manifest_sha256: str = ""
    continue_from: str = ""
    reference: str = ""


class About(msgspec.Struct, frozen=True, kw_only=True):
    """The content of the file.

    Attributes:
        uid: uid of the run directory, drawn by its first attempt and kept by the others.
        attempt: number of the attempt.
        step: completed steps when it began.
        unix_seconds: start time.
        command: the program and its arguments.
        directory: working directory.
        user: user that runs it.
        host: host of rank 0.
        launched_by: the launcher's placement of rank 0.
        source_tree: None outside a git checkout.
        python: Python version.
        packages: versions of the relevant packages.
        platform: cpu or cuda.
        gpu: name of rank 0's GPU; empty without one.
        world_size: number of processes, each with one GPU if there are GPUs.
        layout: in words.
        degrees: tensor, pipeline, virtual_pipeline, context, data.
        kernels: implementation of every op.
        kernel_reasons: reason for each choice.
        sources: training sources.
        held_out: held-out sources.
        stage: stage of the run.
        name: name of the run.
        origins: checkpoints of other runs that it starts from.
        recipe: every key by its dotted name; tables and lists as JSON text.
    """

    uid: str
    attempt: int
    step: int
    unix_seconds: float
    command: tuple[str, ...]
    directory: str
    user: str
    host: str
    launched_by: LaunchedBy
    source_tree: SourceTree | None
    python: str
    packages: dict[str, str]
    platform: str
    gpu: str
    world_size: int
    layout: str
    degrees: dict[str, int]
    kernels: dict[str, str]
    kernel_reasons: dict[str, str]
    sources: tuple[AboutSource, ...]
    held_out: tuple[AboutSource, ...]
    stage: str
    name: str
    origins: Origins
    recipe: Mapping[str, Any]


def about_path(run_dir: Path, attempt: int) -> Path:
    """Return the path of an attempt's file."""
    return run_dir / ABOUT_DIR / f"{attempt:07d}.json"


def write_about(run_dir: Path, about: About) -> None:
    """Write an attempt's file atomically.

    Raises:
        DiskFullError: it does not fit on the disk.
        OSError: the file system fails otherwise.
    """
    path = about_path(run_dir, about.attempt)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, msgspec.json.format(msgspec.json.encode(about), indent=1) + b"\n")


def read_abouts(run_dir: Path) -> list[About]:
    """Read those of all attempts, oldest first; skips damaged files and files of other versions.

    Attempts that wrote none are missing as well.
    """
    try:
        names = sorted(path.name for path in (run_dir / ABOUT_DIR).iterdir())
    except OSError:
        return []
    found = []
    for name in filter(_NAME.fullmatch, names):
        try:
            content = (run_dir / ABOUT_DIR / name).read_bytes()
            found.append(msgspec.json.decode(content, type=About))
        except (OSError, msgspec.DecodeError):
            continue
    return sorted(found, key=lambda about: about.attempt)


def abouts_of_training(run_dir: Path) -> list[About]:
    """Read those of the current training in a directory, oldest first.

    A start without a checkpoint, under a recipe that differs in keys other than `free` ones, begins
    another training: earlier records do not belong to it.
    """
    found: list[About] = []
    for about in read_abouts(run_dir):
        if found and about.step == 0 and _is_other(found[-1], about):
            found = []
        found.append(about)
    return found


def _is_other(before: About, after: About) -> bool:
    kinds = key_kinds()
    keys = before.recipe.keys() & after.recipe.keys()
    counting = (key for key in keys if kinds.get(key) != "free")
    return any(before.recipe.get(key) != after.recipe.get(key) for key in counting)


def uid_of(run_dir: Path) -> str:
    """Return the uid of a run directory, or a new one if no attempt has recorded it."""
    abouts = read_abouts(run_dir)
    return abouts[0].uid if abouts else uuid.uuid4().hex
