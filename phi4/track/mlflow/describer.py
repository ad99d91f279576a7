"""Update everything that MLflow shows of a run, except its points, from the run directory."""

from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from phi4.rundir.about import About, read_abouts
from phi4.rundir.mlflow_ids import read_mlflow_ids, write_mlflow_ids
from phi4.track.mlflow.datasets import log_datasets
from phi4.track.mlflow.description import (
    Description,
    apply,
    describe,
    mark_experiment,
    send_artifacts,
)
from phi4.track.mlflow.lineage import PARENT_TAG, lineage_tags, parent_of, settle_parent

if TYPE_CHECKING:
    from mlflow import MlflowClient


class Describer:
    """Description, datasets, lineage and small files of one run.

    Args:
        run_dir: run directory of the run.
        client: client of the store.
        uri: uri of the store, as mlflow.json holds it.
        experiment_id: experiment id of the run.
        run_id: the run in MLflow.
    """

    def __init__(
        self, run_dir: Path, client: "MlflowClient", *, uri: str, experiment_id: str, run_id: str
    ) -> None:
        self._run_dir, self._client = run_dir.resolve(), client
        self._uri, self._experiment_id, self._run_id = uri, experiment_id, run_id
        self._shown: tuple[Description, int] | None = None
        self._sent: Description | None = None
        self.parent_run_id = ""

    def update(self) -> None:
        """Send what is new in the run directory; otherwise only reads it.

        Raises:
            MlflowException: the store refuses or is unreachable; calling again continues.
            OSError: a file of the run directory cannot be read.
        """
        description, abouts = describe(self._run_dir), read_abouts(self._run_dir)
        if self._shown != (description, len(abouts)):
            mark_experiment(self._client, self._experiment_id)
            apply(self._client, self._run_id, description)
            if abouts:
                self._relate(abouts[-1])
                log_datasets(self._client, self._run_id, abouts[-1])
            self._shown = (description, len(abouts))
        if self._sent != description:
            # Last, because artifacts may be in a separate store that is unreachable.
            send_artifacts(self._client, self._run_id, description, self._sent)
            self._sent = description

    def settle(self) -> None:
        """Update the parent's status after the run's own.

        Raises:
            MlflowException: the store refuses or is unreachable; calling again continues.
        """
        if self.parent_run_id:
            settle_parent(self._client, self.parent_run_id, [self._experiment_id])

    def _relate(self, about: About) -> None:
        self.parent_run_id = parent_of(
            self._client,
            self._run_dir,
            about,
            uri=self._uri,
            experiment_id=self._experiment_id,
        )
        tags = {PARENT_TAG: self.parent_run_id, **lineage_tags(about, uri=self._uri)}
        known = self._client.get_run(self._run_id).data.tags
        for key, value in tags.items():
            if known.get(key) != value:
                self._client.set_tag(self._run_id, key, value)
        ids = read_mlflow_ids(self._run_dir)
        if ids and (ids.uri, ids.run_id) == (self._uri, self._run_id):
            related = msgspec.structs.replace(ids, parent_run_id=self.parent_run_id)
            if related != ids:
                write_mlflow_ids(self._run_dir, related)
