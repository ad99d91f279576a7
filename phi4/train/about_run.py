"""The provenance of this attempt: who started it, from which code and on which data.

Gathered on rank 0 once everything is built. A fact that cannot be determined is left empty: nothing
here may keep a run from starting.
"""

import getpass
import importlib.util
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from platform import python_version
from typing import Any

import torch

from phi4 import __version__
from phi4.config import Recipe, SourceConfig
from phi4.data.stream.sources import SourceManifest
from phi4.engine.layout import Layout
from phi4.rundir.about import About, AboutSource, Origins, SourceTree, uid_of
from phi4.rundir.launched_by import LaunchedBy
from phi4.rundir.state import RunState
from phi4.train.hooks import RunContext

_PACKAGES = ("torch", "triton", "megatron-core", "transformer-engine", "numpy", "mlflow")
_GIT_SECONDS = 10.0


def about_run(
    context: RunContext,
    manifests: Mapping[str, SourceManifest],
    launched_by: LaunchedBy,
    recipe_params: Mapping[str, Any],
) -> About:
    """Gather the facts of this attempt; only on rank 0, whose lease has begun.

    Args:
        context: the run's context.
        manifests: manifest of each training source, by name.
        launched_by: how rank 0 was launched.
        recipe_params: the flat recipe.
    """
    recipe, platform, engine = context.recipe, context.platform, context.engine
    is_cuda = platform.kind == "cuda"
    held_out = {name: source.manifests[name] for name, source in context.held_out.items()}
    return About(
        uid=uid_of(Path(recipe.run.dir)),
        attempt=context.owned_lease.number,
        step=context.state.step,
        unix_seconds=time.time(),
        command=_command(),
        directory=os.getcwd(),
        user=_user(),
        host=socket.gethostname(),
        launched_by=launched_by,
        source_tree=source_tree(),
        python=python_version(),
        packages={"phi4": __version__, **_versions()},
        platform=platform.kind,
        gpu=torch.cuda.get_device_name(platform.device) if is_cuda else "",
        world_size=platform.world_size,
        layout=engine.layout.describe(),
        degrees=_degrees(engine.layout),
        kernels={choice.op: choice.implementation for choice in engine.choices},
        kernel_reasons={choice.op: choice.reason for choice in engine.choices},
        sources=_sources(recipe.data.sources, manifests),
        held_out=_sources(recipe.data.held_out, held_out),
        stage=recipe.run.stage,
        name=recipe.run.name or Path(recipe.run.dir).resolve().name,
        origins=_origins(recipe, context.state),
        recipe=recipe_params,
    )


def source_tree(package: str = "phi4") -> SourceTree | None:
    """The git checkout that contains a package; None if git does not track the package.

    Args:
        package: name of an importable package. One that is installed below another project's
            checkout does not belong to that project.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        return None
    directory, name = os.path.split(spec.origin)
    if not _git(directory, "ls-files", "--", name):
        return None
    commit = _git(directory, "rev-parse", "HEAD")
    changed = _git(directory, "status", "--porcelain", "--untracked-files=no")
    if not commit or changed is None:
        return None
    return SourceTree(commit, bool(changed))


def _git(directory: str, *words: str) -> str | None:
    """What git prints; None where it fails, hangs or is not installed."""
    # It must neither wait for nor take a lock that a user of the checkout needs.
    command = ["git", "--no-optional-locks", "-C", directory, *words]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_GIT_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired, UnicodeDecodeError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _command() -> tuple[str, ...]:
    program, *arguments = sys.argv
    return ("phi4" if program.endswith("__main__.py") else program, *arguments)


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):
        # A container whose user has no name.
        return str(os.getuid())


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _degrees(layout: Layout) -> dict[str, int]:
    return {
        "tensor": layout.tp_size,
        "pipeline": layout.pp_size,
        "virtual_pipeline": layout.vpp_size,
        "context": layout.cp_size,
        "data": layout.dp_size,
    }


def _sources(
    configs: Iterable[SourceConfig], manifests: Mapping[str, SourceManifest]
) -> tuple[AboutSource, ...]:
    return tuple(
        AboutSource(
            name=config.name,
            path=os.path.abspath(config.path),
            kind=config.kind,
            weight=config.weight,
            sha256=manifest.content_hash,
            num_tokens=sum(shard.num_tokens for shard in manifest.shards),
            num_documents=sum(shard.num_documents for shard in manifest.shards),
            num_shards=len(manifest.shards),
        )
        for config in configs
        for manifest in [manifests[config.name]]
    )


def _origins(recipe: Recipe, state: RunState) -> Origins:
    reference = recipe.dpo.reference
    if recipe.run.stage == "dpo":
        reference = reference or recipe.run.init_from
    return Origins(
        init_from=_absolute(recipe.run.init_from),
        weights=_absolute(state.weights_from),
        weights_manifest_sha256=state.weights_manifest_sha256,
        continue_from=_absolute(recipe.data.continue_from),
        reference=_absolute(reference),
    )


def _absolute(place: str | None) -> str:
    return os.path.abspath(place) if place else ""
