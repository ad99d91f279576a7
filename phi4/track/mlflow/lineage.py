"""Group the runs of one model: a parent run for the model, a child run for each of its stages.

A run that takes weights, a data ledger or a reference model from another run's directory joins the
parent of that run, if both are in the same store. The other run's MLflow ids are in its own
directory (mlflow.json), so the recipe does not mention them. The runs of a sweep have a parent of
their own, by the name of the sweep.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from phi4.rundir.about import About, Origins, read_abouts
from phi4.rundir.mlflow_ids import MlflowIds, read_mlflow_ids
from phi4.rundir.names import ABOUT_DIR
from phi4.track.mlflow.limits import as_tags

if TYPE_CHECKING:
    from mlflow import MlflowClient

PARENT_TAG = "mlflow.parentRunId"
MODEL_TAG = "phi4.model_of"
"""Tag of a parent: the uid of the run directory that it was made for."""
SWEEP_TAG = "phi4.sweep"
"""Tag of a parent: the sweep whose runs are its children."""

_GONE = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")


def parent_of(
    client: "MlflowClient", run_dir: Path, about: About, *, uri: str, experiment_id: str
) -> str:
    """Return the run id of the model that a run is a stage of; create it if missing.

    Calling again returns the same one, even if a kill prevented it from being recorded.

    Args:
        client: client of the store.
        run_dir: run directory of the run.
        about: metadata of its newest attempt.
        uri: uri of the store, as mlflow.json holds it.
        experiment_id: experiment id of the run.

    Raises:
        MlflowException: the store refuses or is unreachable.
    """
    own, sweep = read_mlflow_ids(run_dir), about.recipe.get("tracking.sweep")
    earlier = () if sweep else (ids for _, ids in _earlier_runs(about.origins))
    for ids in (own, *earlier):
        if ids and ids.uri == uri and ids.parent_run_id and _is_active(client, ids.parent_run_id):
            return ids.parent_run_id
    if found := _oldest_parent(client, about, experiment_id):
        return found
    made = _new_parent(client, about, experiment_id)
    # Concurrent first runs of a sweep may each have created a parent: the oldest one is used.
    oldest = _oldest_parent(client, about, experiment_id)
    if oldest and oldest != made:
        client.delete_run(made)
    return oldest or made


def lineage_tags(about: About, *, uri: str) -> dict[str, str]:
    """Return tags that link a stage's run to the runs of the store that it started from.

    Args:
        about: metadata of its newest attempt.
        uri: uri of the store, as mlflow.json holds it.
    """
    tags = {}
    for key, place in _places(about.origins):
        ids = read_mlflow_ids(run_dir) if (run_dir := _run_dir_of(place)) else None
        if ids and ids.uri == uri:
            tags[f"phi4.{key}.run_id"] = ids.run_id
    return as_tags(tags)


def settle_parent(
    client: "MlflowClient", parent_run_id: str, experiment_ids: Iterable[str] = ()
) -> None:
    """Set a parent's status to that of the child that started last.

    Args:
        client: client of the store.
        parent_run_id: the model's run.
        experiment_ids: experiments of children other than the parent's own.

    Raises:
        MlflowException: the store refuses or is unreachable.
    """
    parent = client.get_run(parent_run_id).info
    newest = client.search_runs(
        sorted({parent.experiment_id, *experiment_ids}),
        filter_string=f"tags.`{PARENT_TAG}` = '{parent_run_id}'",
        order_by=["attributes.start_time DESC"],
        max_results=1,
    )
    if not newest or newest[0].info.status == parent.status:
        return
    child = newest[0].info
    if child.status == "RUNNING":
        client.update_run(parent_run_id, status="RUNNING")
    else:
        client.set_terminated(parent_run_id, status=child.status, end_time=child.end_time)


def _earlier_runs(origins: Origins) -> Iterator[tuple[Path, MlflowIds | None]]:
    """Return directories of the runs that a run started from, nearest first; an untracked run is
    traversed through its own origins."""
    waiting, seen = [origins], set()
    while waiting:
        for _, place in _places(waiting.pop(0)):
            run_dir = _run_dir_of(place)
            if run_dir is None or run_dir in seen:
                continue
            seen.add(run_dir)
            yield run_dir, read_mlflow_ids(run_dir)
            waiting += [about.origins for about in read_abouts(run_dir)[-1:]]


def _places(origins: Origins) -> list[tuple[str, str]]:
    named = (
        ("init_from", origins.weights or origins.init_from),
        ("continue_from", origins.continue_from),
        ("reference", origins.reference),
    )
    return [(key, place) for key, place in named if place]


def _run_dir_of(place: str) -> Path | None:
    """Return the run directory of a checkpoint, a checkpoints directory or a run."""
    path = Path(place)
    candidates = (path, *path.parents[:2])
    told = (p for p in candidates if read_mlflow_ids(p) or (p / ABOUT_DIR).is_dir())
    return next(told, None)


def _is_active(client: "MlflowClient", run_id: str) -> bool:
    """Return whether the store has a run that is not deleted."""
    from mlflow.exceptions import MlflowException

    try:
        return client.get_run(run_id).info.lifecycle_stage == "active"
    except MlflowException as error:
        if error.error_code not in _GONE:
            raise
        return False


def _parent_tag(about: About) -> tuple[str, str]:
    """Return the tag by which a parent is found."""
    sweep = about.recipe.get("tracking.sweep")
    return (SWEEP_TAG, sweep) if sweep else (MODEL_TAG, about.uid)


def _oldest_parent(client: "MlflowClient", about: About, experiment_id: str) -> str | None:
    key, value = _parent_tag(about)
    quote = '"' if "'" in value else "'"
    found = client.search_runs(
        [experiment_id],
        filter_string=f"tags.`{key}` = {quote}{value}{quote}",
        order_by=["attributes.start_time ASC", "attributes.run_id ASC"],
        max_results=1,
    )
    return found[0].info.run_id if found else None


def _new_parent(client: "MlflowClient", about: About, experiment_id: str) -> str:
    key, value = _parent_tag(about)
    name, note = (
        (value, f"A sweep, begun in `{about.directory}`; its runs are below.")
        if key == SWEEP_TAG
        else (
            about.name,
            f"A model; its stages are the runs below. The first one was `{about.name}` "
            f"({about.stage}), whose checkpoints later stages begin with.",
        )
    )
    tags = {
        key: value,
        "mlflow.user": about.user,
        "mlflow.source.name": about.command[0],
        "mlflow.source.type": "LOCAL",
        "mlflow.note.content": note,
    }
    return client.create_run(
        experiment_id,
        start_time=int(1000 * about.unix_seconds),
        tags=as_tags(tags),
        run_name=name,
    ).info.run_id
