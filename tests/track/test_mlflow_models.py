"""An exported model as a version of a registered model, in a local store."""

from pathlib import Path

import mlflow
import pytest

from phi4.errors import ConfigError
from phi4.track.mlflow.models import ExportedModel, register_export
from tests.support.mlflow_stores import Store


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store(tmp_path_factory.mktemp("store"))


@pytest.fixture
def exported(tmp_path) -> ExportedModel:
    hf, checkpoint = tmp_path / "hf", tmp_path / "run/checkpoints/step_0000002"
    for directory in (hf, checkpoint):
        directory.mkdir(parents=True)
    (hf / "config.json").write_text("{}")
    (hf / "model.safetensors").write_bytes(bytes(1000))
    (checkpoint / "manifest.json").write_text("{}")
    return ExportedModel.of(hf, checkpoint)


def test_local_store_takes_the_directory_as_a_version_once(store, tmp_path, exported):
    run_id, said = store.new_run(tmp_path / "run"), []
    for _ in range(2):
        assert register_export(exported, "phi4-tiny", say=said.append) == "1"
    version = store.client.get_model_version("phi4-tiny", "1")
    assert (version.run_id, version.source) == (run_id, (tmp_path / "hf").as_uri())
    assert version.tags["phi4.checkpoint.step"] == "2"
    assert version.tags["phi4.checkpoint.manifest_sha256"] == exported.manifest_sha256
    assert said[1].endswith("(registered before)")
    place = store.client.get_model_version_download_uri("phi4-tiny", "1")
    got = mlflow.artifacts.download_artifacts(place, dst_path=str(tmp_path / "got"))
    assert {path.name for path in Path(got).iterdir()} == {"config.json", "model.safetensors"}
    assert store.client.list_artifacts(run_id) == []


def test_upload_sends_the_weights(store, tmp_path, exported):
    run_id = store.new_run(tmp_path / "run")
    register_export(exported, "uploaded", upload=True, say=lambda _: None)
    version = store.client.get_model_version("uploaded", "1")
    place = version.source.removeprefix(f"runs:/{run_id}/")
    sent = {Path(item.path).name for item in store.client.list_artifacts(run_id, place)}
    assert sent == {"config.json", "model.safetensors", "phi4_export.json"}


def test_export_of_a_run_that_nobody_tracked_is_refused(exported):
    with pytest.raises(ConfigError, match=r"has no mlflow\.json"):
        register_export(exported, "name")


def test_refusal_of_the_store_is_one_line(store, tmp_path, exported):
    store.new_run(tmp_path / "run")
    with pytest.raises(ConfigError, match=r"did not register a/b.*phi4 convert register"):
        register_export(exported, "a/b")
    with pytest.raises(ConfigError, match="is tracked at sqlite"):
        register_export(exported, "name", uri="http://127.0.0.1:1")
