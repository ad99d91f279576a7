"""A model version on a real tracking server, which takes no path of another machine."""

import json
import shutil
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import mlflow
import pytest

from phi4.rundir.mlflow_ids import MlflowIds, write_mlflow_ids
from phi4.track.mlflow.models import ExportedModel, register_export
from tests.support.in_process import phi4, write_recipe
from tests.support.ranks import run_ranks
from tests.support.waiting import wait_until

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a tracking server."""
    root = tmp_path_factory.mktemp("server")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    uri = f"http://127.0.0.1:{port}"
    words = ["server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    words += ["--backend-store-uri", f"sqlite:///{root}/mlflow.db"]
    words += ["--artifacts-destination", str(root / "artifacts")]
    with (root / "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "mlflow", *words], stdout=log, stderr=log, cwd=root
        )
        try:
            wait_until(lambda: answers(uri), "the server's answer")
            yield uri
        finally:
            process.terminate()
            process.wait()


def answers(uri: str) -> bool:
    try:
        with urllib.request.urlopen(f"{uri}/health") as reply:
            return reply.status == 200
    except urllib.error.URLError:
        return False


def train_and_export(rank: int, world_size: int, root: Path) -> None:
    for words in (["train", "recipe.toml"], ["convert", "to-hf", "run", "hf"]):
        code, text = phi4(rank, world_size, root, words)
        assert code == 0, text


def register(rank: int, world_size: int, root: Path, words: list[str]) -> tuple[int, str]:
    return phi4(rank, world_size, root, ["convert", *words])


@pytest.fixture(scope="module")
def trained(server: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a run that the server shows, and its export."""
    root = tmp_path_factory.mktemp("trained")
    write_recipe(root)
    run_ranks(1, train_and_export, root)
    client = mlflow.MlflowClient(server)
    experiment_id = client.create_experiment("phi4")
    run_id = client.create_run(experiment_id).info.run_id
    ids = MlflowIds(uri=server, experiment_id=experiment_id, run_id=run_id)
    write_mlflow_ids(root / "run", ids)
    return root


def test_server_that_takes_no_path_gets_a_pointer(server: str, trained: Path) -> None:
    checkpoint = trained / "run/checkpoints/step_0000001"
    exported, said = ExportedModel.of(trained / "hf", checkpoint), []
    register_export(exported, "phi4-tiny", say=said.append)
    assert "does not accept a path of this machine" in said[0] and "--upload" in said[0]
    client = mlflow.MlflowClient(server)
    version = client.get_model_version("phi4-tiny", "1")
    assert version.source.startswith(f"runs:/{version.run_id}/exports/step_0000001-")
    assert version.tags["phi4.checkpoint.manifest_sha256"] == exported.manifest_sha256
    (found,) = client.search_model_versions(f"run_id = '{version.run_id}'")
    assert found.tags["phi4.checkpoint.step"] == "1"
    place = version.source.removeprefix(f"runs:/{version.run_id}/")
    sent = {Path(item.path).name for item in client.list_artifacts(version.run_id, place)}
    written = {path.name for path in (trained / "hf").iterdir()}
    small = {name for name in written if not name.endswith(".safetensors")}
    assert sent == {*small, "phi4_export.json"} and small != written
    pointer = client.download_artifacts(version.run_id, f"{place}/phi4_export.json", str(trained))
    told = json.loads(Path(pointer).read_text())
    assert (told["directory"], told["step"]) == (str(trained / "hf"), 1)
    assert told["files"].keys() == written


def test_command_registers_with_and_after_the_export(server: str, trained: Path) -> None:
    words = ["to-hf", "run", "again", "--register", "by-command", "--upload"]
    [(code, text)] = run_ranks(1, register, trained, words)
    assert code == 0 and "wrote again from run" in text and "by-command version 1" in text
    [(code, text)] = run_ranks(1, register, trained, ["register", "run", "again", "by-command"])
    assert code == 0 and text.endswith("(registered before)\n")
    client = mlflow.MlflowClient(server)
    version = client.get_model_version("by-command", "1")
    place = version.source.removeprefix(f"runs:/{version.run_id}/")
    sent = {Path(item.path).name for item in client.list_artifacts(version.run_id, place)}
    assert "model-00001-of-00001.safetensors" in sent


def test_untracked_run_is_refused_before_the_export(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained / "run/checkpoints", tmp_path / "copy/checkpoints")
    words = ["to-hf", str(tmp_path / "copy"), str(tmp_path / "out"), "--register", "name"]
    [(code, text)] = run_ranks(1, register, trained, words)
    assert code == 2 and "has no mlflow.json" in text
    assert not (tmp_path / "out").exists()
