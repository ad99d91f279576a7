"""Dataset inputs of a run in MLflow: training sources and held-out sources.

The digest is of a source's content, independent of its path, so equal data have equal digests
across runs. MLflow keeps one dataset per experiment, name and digest, so values that belong to one
run, such as the weight in its blend, are tags of the input.
"""

import json
from typing import TYPE_CHECKING

from phi4.rundir.about import About, AboutSource
from phi4.track.mlflow.troubles import without_password

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import DatasetInput

DIGEST_CHARACTERS = 36
"""MLflow's limit; the full sha256 is in the profile and a tag."""
_NAME_CHARACTERS = 500
_TAG_CHARACTERS = 500


def dataset_inputs(about: About) -> "list[DatasetInput]":
    """Return training sources in the context `training`, held-out ones in `evaluation`.

    A source that is both under the same name becomes two datasets, because MLflow gives a dataset
    of a run one context.
    """
    training = {source.name for source in about.sources}
    inputs = [_input(source, source.name, "training") for source in about.sources]
    for source in about.held_out:
        name = f"{source.name} (held out)" if source.name in training else source.name
        inputs.append(_input(source, name, "evaluation"))
    return inputs


def log_datasets(client: "MlflowClient", run_id: str, about: About) -> None:
    """Add missing datasets to a run in MLflow; those of earlier attempts are kept.

    Raises:
        MlflowException: the store refuses or is unreachable; calling again continues.
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
