"""The data of a run as MLflow's dataset inputs: what was trained on, and what was held out.

The digest is of what a source holds, wherever it lies, so equal data have equal digests over runs.
MLflow keeps one dataset per experiment, name and digest, so what belongs to a run alone, such as
the weight in its blend, is a tag of the input.
"""

import json
from typing import TYPE_CHECKING

from phi4.rundir.about import About, AboutSource
from phi4.track.mlflow.troubles import without_password

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import DatasetInput

DIGEST_CHARACTERS = 36
"""MLflow takes no more; the whole sha256 is in the profile and a tag."""
_NAME_CHARACTERS = 500
_TAG_CHARACTERS = 500


def dataset_inputs(about: About) -> "list[DatasetInput]":
    """Training sources in the context `training`, held-out ones in `evaluation`.

    A source that is both by one name is two datasets: MLflow gives a dataset of a run one context.
    """
    training = {source.name for source in about.sources}
    inputs = [_input(source, source.name, "training") for source in about.sources]
    for source in about.held_out:
        name = f"{source.name} (held out)" if source.name in training else source.name
        inputs.append(_input(source, name, "evaluation"))
    return inputs


def log_datasets(client: "MlflowClient", run_id: str, about: About) -> None:
    """Add the datasets that a run in MLflow lacks; those of earlier attempts stay.

    Raises:
        MlflowException: the store refuses, or is out of reach; another call goes on.
    """
    known = {
        (found.dataset.name, found.dataset.digest)
        for found in client.get_run(run_id).inputs.dataset_inputs
    }
    lacking = [
        found
        for found in dataset_inputs(about)
        if (found.dataset.name, found.dataset.digest) not in known
    ]
    if lacking:
        client.log_inputs(run_id, datasets=lacking)


def _input(source: AboutSource, name: str, context: str) -> "DatasetInput":
    from mlflow.entities import Dataset, DatasetInput, InputTag

    profile = {
        # The names under which MLflow's page shows sizes.
        "num_rows": source.num_documents,
        "num_elements": source.num_tokens,
        "num_tokens": source.num_tokens,
        "num_shards": source.num_shards,
        "sha256": source.sha256,
    }
    dataset = Dataset(
        name=name[:_NAME_CHARACTERS],
        digest=source.sha256[:DIGEST_CHARACTERS],
        source_type="local",
        source=json.dumps({"uri": without_password(source.path)}),
        profile=json.dumps(profile),
    )
    tags = {
        "mlflow.data.context": context,
        "phi4.weight": f"{source.weight:g}",
        "phi4.kind": source.kind,
        "phi4.sha256": source.sha256,
        "phi4.path": without_password(source.path),
    }
    return DatasetInput(dataset, [InputTag(key, v[:_TAG_CHARACTERS]) for key, v in tags.items()])
