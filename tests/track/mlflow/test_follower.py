"""A record brought into MLflow, read back by MLflow's own client; and what goes wrong meanwhile."""

import math
from pathlib import Path
from unittest.mock import patch

import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from phi4.config import with_overrides
from phi4.errors import TrackingError
from phi4.track.mlflow.points import Point, PointBatch
from tests.support.abouts import begun
from tests.support.tracked_runs import TrackedDir


@pytest.fixture
def run(tmp_path) -> TrackedDir:
    return TrackedDir(tmp_path / "runs" / "one")


def test_run_has_its_points_status_recipe_and_artifact(run):
    run.begin()
    run.train([1], **{"held_out_loss/a b:c": 2.0, "a(b)@100": 1.0, "worst": math.inf})
    run.train(range(2, 11))
    follower = run.follow()
    assert run.run().info.status == "RUNNING"
    follower.describe()
    run.end("finished")
    follower.conclude("finished")
    found = run.run()
    assert run.steps() == list(range(1, 11))
    assert [m.value for m in run.history("loss")] == [1 / step for step in range(1, 11)]
    assert [m.timestamp for m in run.history("loss")][:2] == [1_001_000, 1_002_000]
    assert set(found.data.metrics) == {"loss", "held_out_loss/a b:c", "a_b__100-0b3170", "worst"}
    assert math.isnan(found.data.metrics["worst"])
    assert (found.info.status, found.info.run_name) == ("FINISHED", "one")
    assert found.data.params["run.steps"] == "10"
    assert found.data.tags["attempt_1"] == "finished"
    [artifact] = run.client.list_artifacts(found.info.run_id)
    copy = run.client.download_artifacts(found.info.run_id, artifact.path, str(run.run_dir))
    assert Path(copy).read_text().startswith("[model]")
    assert found.info.artifact_uri.startswith((run.run_dir.parent / "mlartifacts").as_uri())
    address = f"sqlite:///{run.run_dir.parent}/mlflow.db"
    assert run.said == [
        f"MLflow: {address} (the default), experiment phi4 (the default), run {found.info.run_id}"
    ]


def test_training_that_begins_anew_under_another_recipe_is_another_run(run):
    run.begin()
    begun(run.run_dir, attempt=1)
    run.train(range(1, 5))
    run.follow()
    first = run.run().info.run_id
    run.end()
    # Killed before a checkpoint, and started again: the same recipe, then another one.
    run.begin()
    begun(run.run_dir, attempt=2)
    run.train(range(1, 3))
    run.follow()
    assert (run.run().info.run_id, run.steps()) == (first, [1, 2, 3, 4])
    run.end()
    run.begin()
    begun(run.run_dir, attempt=3, recipe={"optim.learning_rate": 1e-4})
    run.train(range(1, 4))
    run.follow()
    second = run.run().info
    assert second.run_id != first and run.steps() == [1, 2, 3]
    assert run.client.get_run(first).info.status == "KILLED"
    run.end()
    run.begin(resume_step=3)
    begun(run.run_dir, attempt=4, step=3, recipe={"optim.learning_rate": 2e-4})
    run.train(range(4, 6))
    (run.run_dir / "mlflow.json").unlink()
    run.follow()
    assert (run.run().info.run_id, run.steps()) == (second.run_id, [1, 2, 3, 4, 5])


def test_kill_resume_and_roll_back_leave_one_point_per_step(run):
    run.begin()
    run.train(range(1, 9))
    run.follow()
    run.end()
    # Killed at step 8; goes on from the checkpoint of step 5 and is rolled back to it at step 7.
    run.begin(resume_step=5)
    run.train(range(6, 8))
    follower = run.follow()
    first = run.run()
    assert run.steps() == list(range(1, 9))
    assert first.data.tags["attempt_1"].startswith("killed: ")
    run.log.rewind(5)
    run.train(range(6, 11), loss=0.5, rolled_back_from=7, roll_backs=1)
    follower.catch_up()
    run.end("interrupted", reason="SIGTERM", preempted=True)
    follower.conclude("interrupted")
    found = run.run()
    assert found.info.run_id == first.info.run_id
    assert run.steps() == list(range(1, 11)) and run.history("loss")[-1].value == 0.5
    assert run.steps("after_rollback_1/loss") == [6, 7, 8]
    assert {m.value for m in run.history("after_rollback_1/loss")} == {0.5}
    assert found.info.status == "KILLED"
    tags = {key: found.data.tags[key] for key in ("rollback_1", "attempt_2", "preempted")}
    assert tags == {
        "rollback_1": "steps 6 to 8",
        "attempt_2": "interrupted: SIGTERM",
        "preempted": "true",
    }
    # A replay, to the same store and to an empty one.
    again = run.follower()
    again.catch_up()
    assert (again.num_points, again.arrived) == (0, 10)


def lost_answer(name: str):
    """A client whose next call of this name arrives, without an answer."""
    call = getattr(MlflowClient, name)
    left = [1]

    def once(self, *args, **options):
        result = call(self, *args, **options)
        if left:
            left.clear()
            raise MlflowException("Read timed out")
        return result

    return patch.object(MlflowClient, name, once)


@pytest.mark.parametrize("name", ["create_run", "log_batch"])
def test_request_that_arrived_without_an_answer_is_not_done_twice(run, name):
    run.begin()
    run.train(range(1, 4))
    follower = run.follower()
    with lost_answer(name), pytest.raises(MlflowException):
        follower.catch_up()
    run.train(range(4, 6))
    follower.catch_up()
    assert run.steps() == [1, 2, 3, 4, 5]
    experiments = [e.experiment_id for e in run.client.search_experiments()]
    assert len(run.client.search_runs(experiments)) == 1


def test_request_that_was_lost_is_done_again(run):
    run.begin()
    run.train(range(1, 4))
    follower = run.follow()
    run.train(range(4, 7))
    gone = patch.object(MlflowClient, "log_batch", side_effect=MlflowException("gone"))
    with gone, pytest.raises(MlflowException):
        follower.catch_up()
    follower.catch_up()
    assert run.steps() == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("kind", ["deleted", "unknown"])
def test_run_that_the_store_no_longer_has_is_made_anew(run, kind):
    run.begin()
    run.train(range(1, 4))
    follower = run.follow()
    lost = run.run().info.run_id
    run.client.delete_run(lost)
    if kind == "unknown":
        ids = run.run_dir / "mlflow.json"
        ids.write_text(ids.read_text().replace(lost, "0" * 32))
    run.train([4])
    with pytest.raises(MlflowException):
        follower.catch_up()
    follower.catch_up()
    assert run.run().info.run_id != lost
    assert run.steps() == [1, 2, 3, 4]
    how = "is deleted" if kind == "deleted" else "no longer exists"
    assert how in run.said[-1] and "a new one with all steps is created" in run.said[-1]


def test_changed_recipe_is_a_tag_as_long_as_it_is_changed(run):
    run.begin()
    follower = run.follow()
    follower.describe()
    params = run.run().data.params
    first = run.recipe
    words = ["parallel.tensor=2", f"run.name={'x' * 7000}"]
    run.write_recipe(with_overrides(first, words))
    follower.describe(is_last=True)
    tags = run.run().data.tags
    assert tags["resumed.parallel.tensor"] == "2"
    assert tags["resumed.run.name"].endswith("x... (cut; 7,000 characters)")
    assert run.run().data.params == params
    run.write_recipe(first)
    follower.describe(is_last=True)
    assert not [key for key in run.run().data.tags if key.startswith("resumed.")]


def test_long_parameter_is_cut_with_a_mark(run):
    run.write_recipe(with_overrides(run.recipe, [f"run.name={'x' * 7000}"]))
    run.begin()
    follower = run.follow()
    follower.describe()
    value = run.run().data.params["run.name"]
    assert len(value) == 6000 and value.endswith("x... (cut; 7,000 characters)")


def test_name_that_the_server_refuses_keeps_no_other_point_away(run):
    run.begin()
    follower = run.follow()
    points = (Point("a@b", 1, 1, 1.0), Point("fine", 1, 1, 2.0), Point("a@b", 2, 2, 1.0))
    follower._send(PointBatch({}, points, 2))
    assert run.run().data.metrics == {"fine": 2.0}
    [line] = [text for text in run.said if "a@b" in text]
    assert "the metric 'a@b' is refused and skipped: " in line


def test_description_that_fails_keeps_no_point_away(run):
    run.begin()
    run.train(range(1, 4))
    follower = run.follow()
    with patch.object(MlflowClient, "log_artifact", side_effect=PermissionError(13, "no", "/a/b")):
        follower.describe(is_last=True)
        follower.describe(is_last=True)
    run.train([4])
    follower.catch_up()
    assert run.steps() == [1, 2, 3, 4]
    [line] = [text for text in run.said if "the run's description" in text]
    assert "the run's description is incomplete: PermissionError" in line


def test_environment_counts_where_the_recipe_does_not_say(tmp_path, monkeypatch):
    for name in ("mine", "theirs"):
        (tmp_path / name).mkdir()
    theirs = f"sqlite:///{tmp_path}/runs/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", theirs)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "of the environment")
    run = TrackedDir(tmp_path / "runs" / "one")
    run.begin()
    run.follow()
    experiment = run.client.get_experiment(run.run().info.experiment_id)
    assert experiment.name == "of the environment"
    assert run.said[0].startswith(
        f"MLflow: {theirs} (MLFLOW_TRACKING_URI), experiment of the environment "
        "(MLFLOW_EXPERIMENT_NAME), run "
    )


def test_recipe_counts_more_than_the_environment(run, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "of the environment")
    words = [f"tracking.uri=sqlite:///{run.run_dir.parent}/mlflow.db", "tracking.experiment=mine"]
    run.write_recipe(with_overrides(run.recipe, words))
    run.begin()
    run.follow()
    assert run.client.get_experiment(run.run().info.experiment_id).name == "mine"
    assert "(tracking.uri), experiment mine (tracking.experiment)" in run.said[0]


def test_run_of_the_environment_is_logged_into(run, monkeypatch):
    made = run.client.create_run("0", run_name="a user's")
    run.client.log_metric(made.info.run_id, "users", 1.0, step=77)
    monkeypatch.setenv("MLFLOW_RUN_ID", made.info.run_id)
    run.begin()
    run.train(range(1, 4))
    run.follow()
    assert run.run().info.run_id == made.info.run_id and run.steps() == [1, 2, 3]
    monkeypatch.setenv("MLFLOW_RUN_ID", "0" * 32)
    with pytest.raises(
        TrackingError, match=r"MLFLOW_RUN_ID=0+: .* has no such run, expected an existing run"
    ):
        run.follow()


def test_deleted_experiment_is_told_with_its_remedy(run):
    run.client.delete_experiment(run.client.create_experiment("phi4"))
    run.begin()
    with pytest.raises(TrackingError, match=r"'phi4' is deleted, .*mlflow experiments restore"):
        run.follow()


@pytest.mark.parametrize("uri", ["foo", "./mlruns", "xyz://a", "http://", "http:///x"])
def test_address_that_is_none_is_told(run, uri):
    run.write_recipe(with_overrides(run.recipe, [f"tracking.uri={uri}"]))
    with pytest.raises(
        TrackingError, match=r"tracking.uri=\S+ is not an address of a tracking server"
    ):
        run.follow()
