"""Fill MLflow from a run's directory, and set the final status of killed runs."""

from collections.abc import Callable
from pathlib import Path

import msgspec

from phi4.config import Recipe, recipe_from_toml
from phi4.errors import DataError, OwnershipError, TrackingError
from phi4.rundir import require_free
from phi4.rundir.mlflow_ids import read_mlflow_ids
from phi4.rundir.names import CONFIG_FILE
from phi4.track.mlflow.address import address_of
from phi4.track.mlflow.follower import Follower
from phi4.track.mlflow.store import MlflowStore
from phi4.track.mlflow.troubles import trouble_of
from phi4.track.mlflow.wish import TrackingWish, wish_of

Say = Callable[[str], None]


def replay(
    run_dir: Path, say: Say, *, uri: str | None = None, experiment: str | None = None
) -> None:
    """Send what a server lacks of a run's record; idempotent.

    A run that has ended also gets its final status.

    Args:
        run_dir: run directory of the run.
        say: takes lines for the user.
        uri: address of the server or store; None for the one that already tracks the run.
        experiment: the same, for a run that the server does not have yet.

    Raises:
        DataError: there is no run in the directory.
        OwnershipError: the run is active and fills the same server itself.
        TrackingError: the server refuses; the message has its reason.
    """
    wish = _recorded_wish(run_dir)
    if uri is not None:
        wish = msgspec.structs.replace(wish, uri=uri)
    if experiment is not None:
        wish = msgspec.structs.replace(wish, experiment=experiment)
    owner = _living_owner(run_dir, say)
    store = MlflowStore(wish, is_training=False)
    known = read_mlflow_ids(run_dir)
    if owner is not None and (known is None or known.uri == store.uri):
        raise owner
    try:
        _fill(run_dir, store, say, is_over=owner is None)
    except Exception as error:
        raise TrackingError(f"{store.uri}: {trouble_of(error).text}") from error


def settle(run_dir: Path, say: Say) -> None:
    """Set the final status of a killed run, and send what is missing.

    Raises:
        DataError: there is no run in the directory.
        OwnershipError: the run is active.
        TrackingError: the server refuses; the message has its reason.
    """
    recipe = _recipe(run_dir)
    owner = _living_owner(run_dir, say)
    if owner is not None:
        raise owner
    if not recipe.tracking.mlflow and read_mlflow_ids(run_dir) is None:
        say(f"{run_dir}: trained without MLflow; `phi4 track replay {run_dir}` sends it there")
        return
    replay(run_dir, say)


def send_file(run_dir: Path, path: Path, say: Say) -> None:
    """Send a small file as an artifact of the run's MLflow run.

    Raises:
        DataError: there is no run in the directory, or it is not in MLflow.
        TrackingError: the server refuses; the message has its reason.
    """
    wish, known = _recorded_wish(run_dir), read_mlflow_ids(run_dir)
    if known is None:
        raise DataError(
            f"{run_dir} is not in MLflow; send it first with `phi4 track replay {run_dir}`"
        )
    store = MlflowStore(wish, is_training=False)
    try:
        store.client.log_artifact(known.run_id, str(path))
    except Exception as error:
        raise TrackingError(f"{store.uri}: {trouble_of(error).text}") from error
    say(f"{path.name} is an artifact of run {known.run_id} at {store.uri}")


def _fill(run_dir: Path, store: MlflowStore, say: Say, *, is_over: bool) -> None:
    follower = Follower(run_dir.resolve(), store, say)
    follower.catch_up()
    follower.show_machines()
    line = f"{run_dir}: run {follower.run_id} at {store.uri} has all {follower.arrived:,} steps"
    line += f" ({follower.num_points:,} points were missing)"
    if is_over:
        ended = follower.conclude()
        line += f"; its status is {ended.status}"
    follower.describe(is_last=True)
    say(line)


def _recorded_wish(run_dir: Path) -> TrackingWish:
    """Return the tracking settings of the run's recipe, with the store that already tracks it."""
    wish = wish_of(_recipe(run_dir), run_dir)
    known = read_mlflow_ids(run_dir)
    if known is None or address_of(wish) == known.uri:
        # The recorded address lacks a password that this one may have.
        return wish
    return msgspec.structs.replace(wish, uri=known.uri)


def _recipe(run_dir: Path) -> Recipe:
    config = run_dir / CONFIG_FILE
    try:
        text = config.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(f"{config} does not exist; give the directory of a run") from None
    return recipe_from_toml(text, where=str(config))


def _living_owner(run_dir: Path, say: Say) -> OwnershipError | None:
    """Return an OwnershipError that names the process training the run; None if there is none."""
    try:
        require_free(run_dir, say=say)
    except OwnershipError as error:
        return error
    return None
