"""Register an exported model as a version of a registered model in MLflow.

Weights are sent only on request. A store that this process opens itself (sqlite, a database)
accepts the directory as the version's source. A tracking server refuses paths of other machines;
there the source is a folder of the run's artifacts with the small files of the export and a file
that gives the location of the weights.
"""

import json
import socket
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, NamedTuple

from phi4.errors import ConfigError
from phi4.rundir.checkpoints import step_of
from phi4.rundir.manifest import manifest_hash
from phi4.rundir.mlflow_ids import MlflowIds, read_mlflow_ids
from phi4.track.mlflow.address import connect
from phi4.track.mlflow.limits import as_tags
from phi4.track.mlflow.troubles import without_password

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

POINTER_FILE = "phi4_export.json"
_WEIGHTS = (".safetensors", ".bin", ".gguf", ".pt")
_SMALL_BYTES = 20_000_000
"""Size limit of all small files together; a tokenizer of 100,000 words takes a third of it."""


class ExportedModel(NamedTuple):
    """A Hugging Face directory and the checkpoint that it was exported from.

    Attributes:
        directory: absolute.
        checkpoint: absolute.
        step: step of the checkpoint.
        manifest_sha256: manifest sha256 of the checkpoint.
    """

    directory: Path
    checkpoint: Path
    step: int
    manifest_sha256: str

    @classmethod
    def of(cls, directory: Path, checkpoint: Path) -> "ExportedModel":
        """Read the checkpoint's metadata.

        Raises:
            CheckpointError: it is not a checkpoint, or has no manifest.
            ConfigError: the directory has no model.
        """
        directory, checkpoint = directory.resolve(), checkpoint.resolve()
        if not (directory / "config.json").is_file():
            raise ConfigError(
                f"{directory} has no config.json, expected a directory that `phi4 convert to-hf` "
                "wrote; export the checkpoint first"
            )
        return cls(directory, checkpoint, step_of(checkpoint), manifest_hash(checkpoint))


def register_export(
    exported: ExportedModel,
    name: str,
    *,
    uri: str | None = None,
    upload: bool = False,
    say: Callable[[str], None] = print,
) -> str:
    """Register an export as a version of a registered model, in the store of its run.

    The same export of the same checkpoint is registered only once.

    Args:
        exported: directory written by `phi4 convert to-hf`.
        name: name of the registered model, which is created if missing.
        uri: address of the store; the one in the run's mlflow.json if None.
        upload: also send the weights, as artifacts of the run.
        say: prints a line for the user.

    Returns:
        The version's number.

    Raises:
        ConfigError: the run is not tracked, or the store refuses the model.
    """
    from mlflow.exceptions import MlflowException

    ids = require_shown(exported.checkpoint, uri)
    client = connect(uri or ids.uri)
    try:
        _ensure_model(client, name)
        found = _registered(client, exported, name, ids.run_id)
        version = found or _new_version(client, exported, name, ids.run_id, upload, say)
    except MlflowException as error:
        reason = without_password(str(error)).partition("\n")[0]
        raise ConfigError(
            f"MLflow at {ids.uri} did not register {name} ({reason}); the export "
            f"{exported.directory} is complete: try again with `phi4 convert register`"
        ) from None
    say(
        f"{name} version {version.version} in MLflow at {ids.uri}: {version.source}"
        f"{' (registered before)' if found else ''}"
    )
    return str(version.version)


def require_shown(checkpoint: Path, uri: str | None = None) -> MlflowIds:
    """Return the MLflow ids of the run of a checkpoint.

    Args:
        checkpoint: checkpoint in the run's directory.
        uri: required address of the store; None accepts any.

    Raises:
        ConfigError: it is not tracked, or in another store.
    """
    run_dir = checkpoint.resolve().parent.parent
    ids = read_mlflow_ids(run_dir)
    if ids is None:
        raise ConfigError(
            f"{run_dir} has no mlflow.json, so the run is not in MLflow; register a checkpoint in "
            f"its run's own directory, or send the run first with `phi4 track replay`"
        )
    if uri is not None and without_password(uri) != ids.uri:
        raise ConfigError(
            f"{run_dir} is tracked at {ids.uri}, not at {without_password(uri)}; a version must "
            f"belong to a run of the same store: omit --tracking-uri, or give that address"
        )
    return ids


def _ensure_model(client: "MlflowClient", name: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _registered(
    client: "MlflowClient", exported: ExportedModel, name: str, run_id: str
) -> "ModelVersion | None":
    """Return the version that an earlier call registered."""
    wanted = _tags(exported)
    versions = client.search_model_versions(f"run_id = '{run_id}'")
    same = (v for v in versions if v.name == name and wanted.items() <= v.tags.items())
    return next(same, None)


def _new_version(
    client: "MlflowClient",
    exported: ExportedModel,
    name: str,
    run_id: str,
    upload: bool,
    say: Callable[[str], None],
) -> "ModelVersion":
    from mlflow.exceptions import MlflowException

    facts = {
        "run_id": run_id,
        "tags": _tags(exported),
        "description": (
            f"Hugging Face directory `{exported.directory}` on {socket.gethostname()}, made from "
            f"`{exported.checkpoint}` (step {exported.step}, manifest sha256 "
            f"`{exported.manifest_sha256}`)."
        ),
    }
    if not upload:
        try:
            return client.create_model_version(name, exported.directory.as_uri(), **facts)
        except MlflowException as error:
            if error.error_code != "INVALID_PARAMETER_VALUE":
                raise
        say(
            "the server does not accept a path of this machine as a model's source; the version "
            f"contains the small files of the export and {POINTER_FILE}, which refers to "
            f"{exported.directory}. --upload also sends the weights"
        )
    place = f"exports/{exported.checkpoint.name}-{exported.manifest_sha256[:8]}"
    _send(client, exported, run_id, place, with_weights=upload)
    return client.create_model_version(name, f"runs:/{run_id}/{place}", **facts)


def _send(
    client: "MlflowClient", exported: ExportedModel, run_id: str, place: str, *, with_weights: bool
) -> None:
    """Send the export's files, or the small ones, and one that gives the location of all of
    them."""
    files = sorted(path for path in exported.directory.iterdir() if path.is_file())
    left = _SMALL_BYTES
    pointer = {
        "host": socket.gethostname(),
        "directory": str(exported.directory),
        "files": {path.name: path.stat().st_size for path in files},
        "checkpoint": str(exported.checkpoint),
        "step": exported.step,
        "manifest_sha256": exported.manifest_sha256,
    }
    for path in files:
        is_small = path.suffix not in _WEIGHTS and path.stat().st_size <= left
        if is_small or with_weights:
            left -= path.stat().st_size
            client.log_artifact(run_id, str(path), place)
    with TemporaryDirectory() as scratch:
        written = Path(scratch) / POINTER_FILE
        written.write_text(json.dumps(pointer, indent=1), encoding="utf-8")
        client.log_artifact(run_id, str(written), place)


def _tags(exported: ExportedModel) -> dict[str, str]:
    return as_tags(
        {
            "phi4.checkpoint.path": exported.checkpoint,
            "phi4.checkpoint.step": exported.step,
            "phi4.checkpoint.manifest_sha256": exported.manifest_sha256,
            "phi4.export.path": exported.directory,
            "phi4.export.host": socket.gethostname(),
        }
    )
