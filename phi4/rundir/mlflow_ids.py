"""mlflow.json: the MLflow run and store in which a run directory is tracked."""

from pathlib import Path

import msgspec

from phi4.data.files.atomic_files import write_atomically
from phi4.rundir.names import MLFLOW_IDS_FILE


class MlflowIds(msgspec.Struct, frozen=True, kw_only=True):
    """The content of the file.

    Attributes:
        uri: tracking server or store, without user and password; a path in it is absolute.
        experiment_id: experiment of the run.
        run_id: the run in MLflow.
        parent_run_id: parent run, of the model that the run is a stage of; empty while unknown.
        first_attempt: first attempt of the training that the run tracks; see `abouts_of_training`.
    """

    uri: str
    experiment_id: str
    run_id: str
    parent_run_id: str = ""
    first_attempt: int = 1


def read_mlflow_ids(run_dir: Path) -> MlflowIds | None:
    """Read the ids; return None if the run is not in MLflow, or the file is damaged."""
    try:
        return msgspec.json.decode((run_dir / MLFLOW_IDS_FILE).read_bytes(), type=MlflowIds)
    except (OSError, msgspec.DecodeError):
        return None


def write_mlflow_ids(run_dir: Path, ids: MlflowIds) -> None:
    """Replace the file atomically.

    Raises:
        DiskFullError: it does not fit on the disk.
        OSError: the file system fails otherwise.
    """
    write_atomically(run_dir / MLFLOW_IDS_FILE, msgspec.json.encode(ids) + b"\n")
