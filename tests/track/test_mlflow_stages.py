"""A model's four stages in MLflow, read back by its own client: who, from what, on which data."""

import getpass
import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import mlflow
import pytest

from phi4.rundir.about import read_abouts
from phi4.rundir.mlflow_ids import MlflowIds, read_mlflow_ids, write_mlflow_ids
from phi4.rundir.save_log import read_saves
from phi4.track.mlflow.describer import Describer
from phi4.train.about_run import source_tree
from tests.support.ranks import run_ranks
from tests.support.stage_chain import STAGES, train_chain, write_chain

SLURM = {
    "SLURM_JOB_ID": "4711",
    "SLURM_JOB_PARTITION": "h100",
    "SLURM_JOB_NODELIST": "n[1-2]",
    "SLURM_ARRAY_JOB_ID": "4700",
    "SLURM_ARRAY_TASK_ID": "3",
    "SLURM_RESTART_COUNT": "1",
}

pytestmark = pytest.mark.slow


class Shown(NamedTuple):
    root: Path
    uri: str
    client: mlflow.MlflowClient
    experiment_id: str
    runs: dict[str, str]

    def run(self, stage: str) -> mlflow.entities.Run:
        return self.client.get_run(self.runs[stage])

    def tags(self, stage: str) -> dict[str, str]:
        return self.run(stage).data.tags

    def run_dir(self, stage: str) -> Path:
        return self.root / "runs" / stage

    def found(self, query: str) -> list[str]:
        """Run names that a search of MLflow finds."""
        runs = self.client.search_runs([self.experiment_id], query)
        return sorted(run.info.run_name for run in runs)


def show(client: mlflow.MlflowClient, uri: str, experiment_id: str, run_dir: Path) -> str:
    """What the follower does besides points."""
    run_id = client.create_run(experiment_id, run_name=run_dir.name).info.run_id
    write_mlflow_ids(run_dir, MlflowIds(uri=uri, experiment_id=experiment_id, run_id=run_id))
    describer = Describer(run_dir, client, uri=uri, experiment_id=experiment_id, run_id=run_id)
    describer.update()
    client.set_terminated(run_id)
    describer.settle()
    return run_id


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shown]:
    root = tmp_path_factory.mktemp("chain")
    write_chain(root)
    run_ranks(1, train_chain, root, SLURM)
    uri = f"sqlite:///{root}/mlflow.db"
    client = mlflow.MlflowClient(uri)
    experiment_id = client.create_experiment("phi4", (root / "mlartifacts").as_uri())
    runs = {stage: show(client, uri, experiment_id, root / "runs" / stage) for stage in STAGES}
    yield Shown(root, uri, client, experiment_id, runs)


def test_experiment_stands_under_model_training(shown: Shown) -> None:
    tags = shown.client.get_experiment(shown.experiment_id).tags
    assert tags["mlflow.experimentKind"] == "custom_model_development"


@pytest.mark.parametrize("stage", STAGES)
def test_stage_tells_code_user_job_and_layout(shown: Shown, stage: str) -> None:
    tags, tree = shown.tags(stage), source_tree()
    assert tags["mlflow.source.git.commit"] == tree.commit
    assert tags["mlflow.source.git.dirty"] == str(tree.is_dirty).lower()
    assert tags["mlflow.user"] == getpass.getuser()
    assert tags["mlflow.source.type"] == "LOCAL" and tags["mlflow.source.name"]
    slurm = {key: value for key, value in tags.items() if key.startswith("phi4.slurm.")}
    assert slurm == {
        "phi4.slurm.job_id": "4711",
        "phi4.slurm.partition": "h100",
        "phi4.slurm.nodelist": "n[1-2]",
        "phi4.slurm.array_job_id": "4700",
        "phi4.slurm.array_task_id": "3",
        "phi4.slurm.restart_count": "1",
    }
    assert tags["phi4.layout"] == "tensor 1, pipeline 1, context 1, data 1"
    assert tags["phi4.kernels.attention"] == "torch"
    assert (tags["phi4.stage"], tags["phi4.attempt"]) == (stage, "1")
    assert tags["phi4.run_dir"] == str(shown.run_dir(stage))
    assert "as Slurm job 4711" in tags["mlflow.note.content"]


def test_search_by_tag_finds_the_stage(shown: Shown) -> None:
    query = "tags.`phi4.stage` = 'sft' and tags.`phi4.layout.tensor` = '1'"
    assert shown.found(query) == ["sft"]
    assert shown.found("tags.`phi4.slurm.job_id` = '4711'") == sorted(STAGES)
    assert shown.found("params.`run.stage` = 'dpo'") == ["dpo"]


def test_all_stages_are_children_of_one_model(shown: Shown) -> None:
    (parent_id,) = {shown.tags(stage)["mlflow.parentRunId"] for stage in STAGES}
    parent = shown.client.get_run(parent_id)
    assert (parent.info.run_name, parent.info.status) == ("pretrain", "FINISHED")
    assert shown.found(f"tags.`mlflow.parentRunId` = '{parent_id}'") == sorted(STAGES)
    for stage in STAGES:
        assert read_mlflow_ids(shown.run_dir(stage)).parent_run_id == parent_id


def test_stage_names_the_runs_that_it_comes_from(shown: Shown) -> None:
    places = ("init_from", "continue_from", "reference")
    found = {
        stage: {
            key: shown.tags(stage)[f"phi4.{key}.run_id"]
            for key in places
            if f"phi4.{key}.run_id" in shown.tags(stage)
        }
        for stage in STAGES
    }
    runs = shown.runs
    assert found == {
        "pretrain": {},
        "midtrain": {"init_from": runs["pretrain"], "continue_from": runs["pretrain"]},
        "sft": {"init_from": runs["midtrain"]},
        "dpo": {"init_from": runs["sft"], "reference": runs["sft"]},
    }
    for stage, before in (("midtrain", "pretrain"), ("sft", "midtrain"), ("dpo", "sft")):
        checkpoint = shown.run_dir(before) / "checkpoints/step_0000002"
        durable = [event for event in read_saves(shown.run_dir(before)) if event.state == "durable"]
        tags = shown.tags(stage)
        assert tags["phi4.init_from"] == str(checkpoint)
        assert tags["phi4.init_from.manifest_sha256"] == durable[-1].manifest_sha256


def test_datasets_have_digests_contexts_and_sizes(shown: Shown) -> None:
    found = {}
    for stage in STAGES:
        for item in shown.run(stage).inputs.dataset_inputs:
            tags = {tag.key: tag.value for tag in item.tags}
            found[stage, item.dataset.name, tags["mlflow.data.context"]] = (item.dataset, tags)
    assert found.keys() == {
        ("pretrain", "web", "training"),
        ("pretrain", "h", "evaluation"),
        ("midtrain", "web", "training"),
        ("midtrain", "long", "training"),
        ("sft", "chats", "training"),
        ("dpo", "pairs", "training"),
    }
    about = {source.name: source for source in read_abouts(shown.run_dir("midtrain"))[0].sources}
    web, tags = found["midtrain", "web", "training"]
    assert web.digest == about["web"].sha256[:36] and tags["phi4.sha256"] == about["web"].sha256
    assert web.digest == found["pretrain", "web", "training"][0].digest
    assert web.digest != found["midtrain", "long", "training"][0].digest
    assert (tags["phi4.weight"], json.loads(web.profile)["num_tokens"]) == ("2", 2000)
    assert mlflow.data.get_source(web).uri == str(shown.root / "web")


def test_checkpoints_are_pointers(shown: Shown, tmp_path: Path) -> None:
    run_id, tags = shown.runs["sft"], shown.tags("sft")
    copy = Path(shown.client.download_artifacts(run_id, "checkpoints.json", str(tmp_path)))
    first, newest = json.loads(copy.read_text())
    durable = [event for event in read_saves(shown.run_dir("sft")) if event.state == "durable"]
    assert [(one["step"], one["manifest_sha256"]) for one in (first, newest)] == [
        (event.step, event.manifest_sha256) for event in durable
    ]
    assert Path(newest["path"]).is_dir() and newest["is_on_disk"] and not newest["is_superseded"]
    prefix = "phi4.checkpoint.latest."
    assert {key.removeprefix(prefix): tags[key] for key in tags if key.startswith(prefix)} == {
        key: str(newest[key]) for key in ("step", "path", "durable", "manifest_sha256")
    }
    sent = {item.path for item in shown.client.list_artifacts(run_id)}
    assert sent == {"config.toml", "about", "checkpoints.json"}


def test_everything_can_be_told_again(shown: Shown) -> None:
    before = [run.to_dictionary() for run in shown.client.search_runs([shown.experiment_id])]
    for stage, run_id in shown.runs.items():
        describer = Describer(
            shown.run_dir(stage),
            shown.client,
            uri=shown.uri,
            experiment_id=shown.experiment_id,
            run_id=run_id,
        )
        describer.update()
        describer.settle()
    after = [run.to_dictionary() for run in shown.client.search_runs([shown.experiment_id])]
    assert after == before and len(after) == len(STAGES) + 1
