"""The description of a run in MLflow: parameters, tags, a note, small files.

`describe` reads only the run directory; `apply` updates a run in MLflow to match it, whatever it
contains. MLflow never changes a parameter, so parameters are those of the first attempt, and a key
with another value in the newest attempt becomes the tag `resumed.KEY`; the tag is removed once the
key has its first value again. Checkpoints are listed by path; weights are never sent.
"""

import json
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phi4.config import recipe_from_toml
from phi4.errors import CheckpointError, DataError
from phi4.rundir.about import About, about_path, abouts_of_training
from phi4.rundir.attempts import utc_text
from phi4.rundir.checkpoints import checkpoint_name, checkpoints_dir, latest_checkpoint
from phi4.rundir.names import ABOUT_DIR, CONFIG_FILE
from phi4.rundir.save_log import counting_manifests, read_saves
from phi4.rundir.state import read_state
from phi4.track.mlflow.limits import (
    PARAM_CHARACTERS,
    as_tags,
    batches,
    mlflow_name,
)
from phi4.track.mlflow.recipe_view import recipe_params
from phi4.track.mlflow.store import cut
from phi4.track.mlflow.troubles import without_password

if TYPE_CHECKING:
    from mlflow import MlflowClient

CHECKPOINTS_ARTIFACT = "checkpoints.json"
KIND_TAG = "mlflow.experimentKind"
CHANGED = "resumed."
_OWNED = (
    *(CHANGED, "phi4.layout", "phi4.kernels.", "phi4.slurm.", "phi4.version.", "phi4.gpu"),
    "phi4.fp8.",
)
"""Tags that are removed if the newest attempt does not have them."""
_NOTE = "mlflow.note.content"


@dataclass(frozen=True)
class Description:
    """Description with MLflow's names, cut to its length limits.

    Attributes:
        params: parameters of the first attempt.
        changed: parameters with another value in the newest attempt, by the same names.
        tags: tags of the newest attempt and of its newest checkpoint.
        note: text shown for a run that has no description yet.
        artifacts: texts by their paths.
    """

    params: Mapping[str, str]
    changed: Mapping[str, str]
    tags: Mapping[str, str]
    note: str
    artifacts: Mapping[str, str]


def describe(run_dir: Path) -> Description:
    """Describe a run directory; one without about/ by its recipe and checkpoints."""
    run_dir = run_dir.resolve()
    abouts = abouts_of_training(run_dir)
    checkpoints = list(_checkpoints(run_dir))
    tags: dict[str, Any] = {"phi4.run_dir": run_dir}
    artifacts = {CHECKPOINTS_ARTIFACT: json.dumps(checkpoints, indent=1)} if checkpoints else {}
    if checkpoints:
        newest = checkpoints[-1]
        tags |= {f"phi4.checkpoint.latest.{key}": newest[key] for key in _POINTER}
    tags |= _fp8_fallbacks(run_dir)
    for path in _files(run_dir, abouts):
        text = path.read_text(encoding="utf-8", errors="replace")
        artifacts[path.relative_to(run_dir).as_posix()] = without_password(text)
    if not abouts:
        params = _as_params(_recipe_in(run_dir))
        return Description(params, {}, as_tags(tags), "", artifacts)
    first, now = _as_params(abouts[0].recipe), _as_params(abouts[-1].recipe)
    return Description(
        params=first,
        changed={key: text for key, text in now.items() if first.get(key) != text},
        tags=as_tags({**_tags(abouts[-1]), **tags}),
        note=_note(abouts[-1], run_dir),
        artifacts=artifacts,
    )


def apply(client: "MlflowClient", run_id: str, description: Description) -> None:
    """Update a run's parameters, tags and note to match a description; idempotent.

    An existing note is kept: a user may have written it.

    Raises:
        MlflowException: the store refuses or is unreachable; calling again continues.
    """
    from mlflow.entities import Param, RunTag

    data = client.get_run(run_id).data
    missing = [Param(k, v) for k, v in description.params.items() if k not in data.params]
    for some in batches(missing):
        client.log_batch(run_id, params=some)
    # A run whose first attempt was described by another file keeps its parameters.
    now = {**description.params, **description.changed}
    changed = {k: v for k, v in now.items() if data.params.get(k, description.params.get(k)) != v}
    tags = {**description.tags, **as_tags({f"{CHANGED}{k}": v for k, v in changed.items()})}
    if description.note and not data.tags.get(_NOTE):
        tags[_NOTE] = description.note
    for some in batches([RunTag(k, v) for k, v in tags.items() if data.tags.get(k) != v]):
        client.log_batch(run_id, tags=some)
    for key in data.tags:
        if key.startswith(_OWNED) and key not in tags:
            client.delete_tag(run_id, key)


def send_artifacts(
    client: "MlflowClient", run_id: str, description: Description, sent: Description | None = None
) -> None:
    """Send the small files, after `apply`: they may be in a separate, unreachable store.

    Args:
        client: client of the store.
        run_id: the run.
        description: description with the files.
        sent: the description that was sent last, whose files are not sent again; None sends all
            except existing files of earlier attempts.

    Raises:
        MlflowException: the store refuses or is unreachable; calling again continues.
    """
    known = {} if sent is None else sent.artifacts
    there = {item.path for item in client.list_artifacts(run_id, ABOUT_DIR)}
    for path, text in description.artifacts.items():
        if known.get(path) != text and path not in there:
            client.log_text(run_id, text, path)


def mark_experiment(client: "MlflowClient", experiment_id: str) -> None:
    """Mark an experiment as model training in MLflow's page, unless the user chose another kind.

    Without a kind the page asks the user for one, and shows the views for agents.

    Raises:
        MlflowException: the store refuses or is unreachable.
    """
    if KIND_TAG not in client.get_experiment(experiment_id).tags:
        client.set_experiment_tag(experiment_id, KIND_TAG, "custom_model_development")


_POINTER = ("step", "path", "durable", "manifest_sha256")


def _checkpoints(run_dir: Path) -> Iterator[dict[str, Any]]:
    """Return every checkpoint that became durable, in order of time."""
    try:
        events = read_saves(run_dir)
    except DataError:
        return
    counting = counting_manifests(run_dir)
    for event in events:
        if event.state == "durable":
            path = checkpoints_dir(run_dir) / checkpoint_name(event.step)
            yield {
                "step": event.step,
                "path": str(path),
                "durable": utc_text(event.unix_seconds),
                "durable_unix_seconds": event.unix_seconds,
                "manifest_sha256": event.manifest_sha256,
                "attempt": event.attempt,
                "optimizer_format": event.optimizer_format,
                "is_superseded": event.manifest_sha256 not in counting,
                "is_on_disk": path.is_dir(),
            }


def _fp8_fallbacks(run_dir: Path) -> dict[str, str]:
    """Return the layers that stopped using FP8, according to the newest checkpoint."""
    newest = latest_checkpoint(checkpoints_dir(run_dir))
    try:
        fallbacks = read_state(newest).fp8_fallbacks if newest else ()
    except CheckpointError:
        return {}
    texts = [f"layer {one.layer} after step {one.step}" for one in fallbacks]
    return {"phi4.fp8.fallbacks": ", ".join(texts)} if texts else {}


def _files(run_dir: Path, abouts: list[About]) -> list[Path]:
    paths = [about_path(run_dir, about.attempt) for about in abouts]
    return [path for path in (run_dir / CONFIG_FILE, *paths) if path.is_file()]


def _recipe_in(run_dir: Path) -> dict[str, Any]:
    """Return the recipe of the newest attempt, for a run whose attempts recorded nothing."""
    config = run_dir / CONFIG_FILE
    if not config.is_file():
        return {}
    return recipe_params(recipe_from_toml(config.read_text(encoding="utf-8"), where=str(config)))


def _as_params(recipe: Mapping[str, Any]) -> dict[str, str]:
    return {
        mlflow_name(key): cut(without_password(str(value)), PARAM_CHARACTERS)
        for key, value in recipe.items()
    }


def _tags(about: About) -> dict[str, Any]:
    tree, origins = about.source_tree, about.origins
    return {
        "mlflow.user": about.user,
        # The page shows the text after the last slash.
        "mlflow.source.name": " ".join(about.command[:2]) if _is_phi4(about) else about.command[0],
        "mlflow.source.type": "LOCAL",
        "mlflow.source.git.commit": tree and tree.commit,
        "mlflow.source.git.dirty": tree and str(tree.is_dirty).lower(),
        "phi4.command": shlex.join(about.command),
        "phi4.stage": about.stage,
        "phi4.attempt": about.attempt,
        "phi4.uid": about.uid,
        "phi4.host": about.host,
        "phi4.directory": about.directory,
        "phi4.platform": about.platform,
        "phi4.gpu": about.gpu,
        "phi4.world_size": about.world_size,
        "phi4.layout": _layout(about),
        **{f"phi4.layout.{key}": degree for key, degree in about.degrees.items()},
        **{f"phi4.kernels.{op}": chosen for op, chosen in about.kernels.items()},
        **{f"phi4.slurm.{key}": value for key, value in about.launched_by.slurm.items()},
        **{f"phi4.version.{name}": found for name, found in about.packages.items()},
        "phi4.version.python": about.python,
        "phi4.init_from": origins.weights or origins.init_from,
        "phi4.init_from.manifest_sha256": origins.weights_manifest_sha256,
        "phi4.continue_from": origins.continue_from,
        "phi4.reference": origins.reference,
    }


def _is_phi4(about: About) -> bool:
    return about.command[0] == "phi4"


def _layout(about: About) -> str:
    return about.layout.removeprefix("layout: ")


def _note(about: About, run_dir: Path) -> str:
    job = about.launched_by.job
    devices = f"{about.world_size} x {about.gpu}" if about.gpu else f"{about.world_size} processes"
    tree = about.source_tree
    dirty = " with uncommitted changes" if tree and tree.is_dirty else ""
    code = f", code of commit `{tree.commit[:12]}`{dirty}" if tree else ""
    begins = f"Its first weights are those of `{about.origins.weights}`. "
    by = f"{about.user} as Slurm job {job}" if job else about.user
    text = f"""Stage **{about.stage}** of Phi-4, started by {by}:

    {shlex.join(about.command)}

In `{about.directory}` on {about.host}, {devices}, {_layout(about)}{code}. \
{begins if about.origins.weights else ""}The run directory `{run_dir}` holds the record \
(metrics.jsonl), the recipe (config.toml) and the checkpoints; what is shown here was read from it.
"""
    return as_tags({_NOTE: text})[_NOTE]
