"""Which runs belong to one model: a parent run for the model, a child run for each of its stages.

A run that takes weights, a data ledger or a reference model from another run's directory joins the
parent of that run, where both are in one store. What that run is in MLflow stands in its own
directory (mlflow.json), so nothing has to be named in a recipe. The runs of a sweep have a parent
of their own, by the name of the sweep.
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
"""On a parent: the uid of the run directory that it was made for."""
SWEEP_TAG = "phi4.sweep"
"""On a parent: the sweep whose runs are its children."""

_GONE = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")


def parent_of(
    client: "MlflowClient", run_dir: Path, about: About, *, uri: str, experiment_id: str
) -> str:
    """The run id of the model that a run is a stage of; it is created where there is none.

    Asking again gives the same one, also where a kill prevented it from being written down.

    Args:
        client: of the store.
        run_dir: of the run.
        about: of its newest attempt.
        uri: of the store, as mlflow.json holds it.
        experiment_id: of the run.

    Raises:
        MlflowException: the store refuses, or is out of reach.
    """
    own, sweep = read_mlflow_ids(run_dir), about.recipe.get("tracking.sweep")
    earlier = () if sweep else (ids for _, ids in _earlier_runs(about.origins))
    for ids in (own, *earlier):
        if ids and ids.uri == uri and ids.parent_run_id and _is_active(client, ids.parent_run_id):
            return ids.parent_run_id
    if found := _oldest_parent(client, about, experiment_id):
        return found
    made = _new_parent(client, about, experiment_id)
    # Runs of a sweep that begin together may all have found none: the oldest of theirs counts.
    oldest = _oldest_parent(client, about, experiment_id)
    if oldest and oldest != made:
        client.delete_run(made)
    return oldest or made


def lineage_tags(about: About, *, uri: str) -> dict[str, str]:
    """What tells a stage's run from which runs of the store it comes.

    Args:
        about: of its newest attempt.
        uri: of the store, as mlflow.json holds it.
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
    """Give a parent the status of the child that began last.

    Args:
        client: of the store.
        parent_run_id: the model's run.
        experiment_ids: where children are besides the parent's own experiment.

    Raises:
        MlflowException: the store refuses, or is out of reach.
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
    """Directories of the runs that a run comes from, nearest first; a run of one that was not
    tracked is found through its own origins."""
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
    """The run directory that a checkpoint, its checkpoints directory or the run itself is of."""
    path = Path(place)
    candidates = (path, *path.parents[:2])
    told = (p for p in candidates if read_mlflow_ids(p) or (p / ABOUT_DIR).is_dir())
    return next(told, None)


def _is_active(client: "MlflowClient", run_id: str) -> bool:
    """Whether the store has a run that nobody deleted."""
    from mlflow.exceptions import MlflowException

    try:
        return client.get_run(run_id).info.lifecycle_stage == "active"
    except MlflowException as error:
        if error.error_code not in _GONE:
            raise
        return False


def _parent_tag(about: About) -> tuple[str, str]:
    """What a parent is found by."""
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
