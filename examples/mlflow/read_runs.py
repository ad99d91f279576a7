"""What MLflow knows of runs, read by its own client; phi4 is not needed for it.

MLFLOW_TRACKING_URI=http://127.0.0.1:5000 python examples/mlflow/read_runs.py first_model
"""

import os
import re
import sys

from mlflow import MlflowClient
from mlflow.entities import Run

# One run over all of its starts; the model that it is a stage of is its parent.
PARENT = "mlflow.parentRunId"


def accepted(client: MlflowClient, run: Run, key: str) -> dict[int, float]:
    """Return the history of a metric that counts, by step.

    After a rollback the steps that MLflow already had are repeated: `after_rollback_<n>/KEY`
    holds what replaces them. The newest that has a step counts.
    """
    tags = [name for name in run.data.tags if name.startswith("rollback_")]
    tags.sort(key=lambda name: [int(number) for number in re.findall(r"\d+", name)])
    again = [f"{name}/{key}" for name in tags]
    names = [key, *(f"after_{name}" for name in again)]
    return {
        point.step: point.value
        for name in names
        for point in client.get_metric_history(run.info.run_id, name)
    }


def main() -> None:
    """Print the runs of an experiment, best held-out loss first."""
    name = sys.argv[1] if len(sys.argv) > 1 else os.environ.get("MLFLOW_EXPERIMENT_NAME", "phi4")
    client = MlflowClient()
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        sys.exit(f"no experiment {name!r}; give its name, and set MLFLOW_TRACKING_URI")
    runs = client.search_runs(
        [experiment.experiment_id],
        filter_string="metrics.held_out_loss > 0",
        order_by=["metrics.held_out_loss ASC"],
    )
    for run in runs:
        loss = accepted(client, run, "loss")
        print(f"{run.info.run_name}: {run.info.status}")
        print(f"  held-out loss {run.data.metrics['held_out_loss']:.4f} after {max(loss)} steps")
        print(f"  learning rate {run.data.params['optim.learning_rate']}")
        print(f"  goodput {run.data.metrics['goodput']:.0%}")
        print(f"  layout {run.data.tags['phi4.layout']}, attempt {run.data.tags['phi4.attempt']}")
        print(f"  commit {run.data.tags.get('mlflow.source.git.commit', 'unknown')[:12]}")
        print(f"  stage of {client.get_run(run.data.tags[PARENT]).info.run_name}")
        for given in run.inputs.dataset_inputs:
            print(f"  data {given.dataset.name}, digest {given.dataset.digest}")


if __name__ == "__main__":
    main()
