"""A sqlite store of MLflow, and what its own client reads there."""

from pathlib import Path

import mlflow

from phi4.rundir.mlflow_ids import MlflowIds, write_mlflow_ids
from phi4.track.mlflow.lineage import parent_of
from tests.support.abouts import about


class Store:
    """A store of this module's own."""

    def __init__(self, root: Path) -> None:
        self.uri = f"sqlite:///{root}/mlflow.db"
        self.client = mlflow.MlflowClient(self.uri)
        self.experiment_id = self.client.create_experiment("e", (root / "artifacts").as_uri())

    def new_run(self, run_dir: Path | None = None, parent: str = "") -> str:
        run_id = self.client.create_run(self.experiment_id).info.run_id
        if run_dir is not None:
            run_dir.mkdir(parents=True, exist_ok=True)
            ids = MlflowIds(
                uri=self.uri,
                experiment_id=self.experiment_id,
                run_id=run_id,
                parent_run_id=parent,
            )
            write_mlflow_ids(run_dir, ids)
        return run_id

    def tags(self, run_id: str) -> dict[str, str]:
        return self.client.get_run(run_id).data.tags

    def params(self, run_id: str) -> dict[str, str]:
        return self.client.get_run(run_id).data.params

    def parent_of(self, run_dir: Path, **changes: object) -> str:
        facts = about(**{"uid": run_dir.name, **changes})
        return parent_of(
            self.client, run_dir, facts, uri=self.uri, experiment_id=self.experiment_id
        )

    def artifact(self, run_id: str, path: str, into: Path) -> str:
        return Path(self.client.download_artifacts(run_id, path, str(into))).read_text()
