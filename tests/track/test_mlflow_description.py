"""What MLflow shows of a run besides points: read back by its own client, again and again."""

import json

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from phi4.rundir.about import abouts_of_training
from phi4.rundir.save_log import SaveLog
from phi4.track.mlflow.datasets import log_datasets
from phi4.track.mlflow.describer import Describer
from phi4.track.mlflow.description import apply, describe, mark_experiment, send_artifacts
from phi4.track.mlflow.limits import as_tags, batches, mlflow_name
from tests.support.abouts import about, begun, source
from tests.support.mlflow_stores import Store


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store(tmp_path_factory.mktemp("store"))


def changed(tags: dict[str, str]) -> dict[str, str]:
    prefix = "resumed."
    return {k.removeprefix(prefix): v for k, v in tags.items() if k.startswith(prefix)}


def test_changed_key_is_a_tag_until_it_has_its_first_value_again(store, tmp_path):
    run_id = store.new_run()
    begun(tmp_path)
    apply(store.client, run_id, describe(tmp_path))
    assert store.params(run_id) == {
        "run.seed": "1",
        "optim.learning_rate": "0.0003",
        "run.name": "None",
    }
    assert changed(store.tags(run_id)) == {}
    begun(tmp_path, attempt=2, step=5, recipe={"optim.learning_rate": 1e-4, "run.seed": 2})
    apply(store.client, run_id, describe(tmp_path))
    assert changed(store.tags(run_id)) == {"optim.learning_rate": "0.0001", "run.seed": "2"}
    begun(tmp_path, attempt=3, step=5, recipe={"run.seed": 2})
    assert describe(tmp_path).changed == {"run.seed": "2"}
    apply(store.client, run_id, describe(tmp_path))
    assert changed(store.tags(run_id)) == {"run.seed": "2"}
    assert store.params(run_id)["optim.learning_rate"] == "0.0003"


def test_params_are_of_the_first_attempt_also_where_the_store_saw_none(store, tmp_path):
    begun(tmp_path)
    begun(tmp_path, attempt=2, step=5, recipe={"run.seed": 2, "new.key": 3})
    run_id = store.new_run()
    apply(store.client, run_id, describe(tmp_path))
    assert store.params(run_id)["run.seed"] == "1"
    assert changed(store.tags(run_id)) == {"run.seed": "2", "new.key": "3"}


def test_another_training_in_the_directory_is_described_by_itself(store, tmp_path):
    begun(tmp_path)
    begun(tmp_path, attempt=2, recipe={"run.dir": "elsewhere"})
    assert [about.attempt for about in abouts_of_training(tmp_path)] == [1, 2], "a free key"
    begun(tmp_path, attempt=3, recipe={"optim.learning_rate": 1e-4})
    begun(tmp_path, attempt=4, step=5, recipe={"optim.learning_rate": 2e-4})
    assert [about.attempt for about in abouts_of_training(tmp_path)] == [3, 4]
    found = describe(tmp_path)
    assert found.params["optim.learning_rate"] == "0.0001"
    assert found.changed == {"optim.learning_rate": "0.0002"}


def test_params_that_another_start_sent_in_part_are_completed(store, tmp_path):
    begun(tmp_path, recipe={f"many.key{i}": i for i in range(250)})
    run_id = store.new_run()
    store.client.log_param(run_id, "many.key7", "7")
    store.client.log_param(run_id, "run.seed", "5")
    apply(store.client, run_id, describe(tmp_path))
    params = store.params(run_id)
    assert len(params) == 253 and params["many.key249"] == "249"
    assert changed(store.tags(run_id)) == {"run.seed": "1"}


def test_tags_that_no_longer_hold_go_and_those_of_others_stay(store, tmp_path):
    begun(tmp_path)
    run_id = store.new_run()
    store.client.set_tag(run_id, "rollback_1", "3..5")
    apply(store.client, run_id, describe(tmp_path))
    assert store.tags(run_id)["phi4.slurm.job_id"] == "47"
    facts = {"launched_by": about().launched_by.__class__(), "kernels": {"swiglu": "torch"}}
    begun(tmp_path, attempt=2, **facts)
    apply(store.client, run_id, describe(tmp_path))
    tags = store.tags(run_id)
    assert not any(key.startswith("phi4.slurm.") for key in tags)
    assert {k for k in tags if k.startswith("phi4.kernels.")} == {"phi4.kernels.swiglu"}
    assert (tags["rollback_1"], tags["phi4.attempt"]) == ("3..5", "2")


def test_note_of_a_user_is_kept(store, tmp_path):
    begun(tmp_path)
    first, second = store.new_run(), store.new_run()
    store.client.set_tag(second, "mlflow.note.content", "mine")
    for run_id in (first, second):
        apply(store.client, run_id, describe(tmp_path))
    note = store.tags(first)["mlflow.note.content"]
    assert "phi4 train recipe.toml" in note and "8 x H100" in note and "ccccccc" in note
    assert "with uncommitted changes" in note and str(tmp_path) in note
    assert store.tags(second)["mlflow.note.content"] == "mine"


def test_no_password_reaches_the_store(store, tmp_path):
    secret = "http://user:secret@host/path"
    begun(
        tmp_path,
        recipe={"tracking.uri": secret},
        command=("phi4", "train", "r.toml", f"tracking.uri={secret}"),
        sources=(msgspec.structs.replace(source("s"), path="s3://user:secret@bucket/x"),),
    )
    (tmp_path / "config.toml").write_text(f'[tracking]\nuri = "{secret}"\n')
    run_id = store.new_run(tmp_path)
    identity = {"experiment_id": store.experiment_id, "run_id": run_id}
    Describer(tmp_path, store.client, uri=store.uri, **identity).update()
    run = json.dumps(store.client.get_run(run_id).to_dictionary())
    files = [
        store.artifact(run_id, name, tmp_path) for name in ("config.toml", "about/0000001.json")
    ]
    assert "secret" not in "".join([run, *files]) and "http://host/path" in run


def test_long_values_and_odd_names_arrive(store, tmp_path):
    begun(tmp_path, recipe={"data.long": "x" * 7000, "odd&key,name": 1}, command=("a", "y" * 9000))
    run_id = store.new_run()
    apply(store.client, run_id, describe(tmp_path))
    apply(store.client, run_id, describe(tmp_path))
    params, tags = store.params(run_id), store.tags(run_id)
    assert len(params["data.long"]) == 6000 and params["data.long"].endswith(
        "(cut; 7,000 characters)"
    )
    assert params["odd_key_name"] == "1" and changed(tags) == {}
    assert len(tags["phi4.command"]) == 8000


def test_description_of_an_empty_directory_changes_nothing(store, tmp_path):
    run_id = store.new_run()
    before = store.tags(run_id)
    apply(store.client, run_id, describe(tmp_path))
    assert store.tags(run_id) == {**before, "phi4.run_dir": str(tmp_path)}


def test_newest_checkpoint_replaces_the_pointer(store, tmp_path):
    begun(tmp_path)
    log, run_id = SaveLog(tmp_path, attempt=1), store.new_run()
    (tmp_path / "checkpoints/step_0000004").mkdir(parents=True)
    sent = None
    for step, digest in ((2, "aa"), (4, "bb"), (3, "cc")):
        log.note(step, "scheduled")
        log.note(step, "durable", manifest_sha256=digest)
        description = describe(tmp_path)
        apply(store.client, run_id, description)
        send_artifacts(store.client, run_id, description, sent)
        sent = description
        tags = store.tags(run_id)
        assert tags["phi4.checkpoint.latest.step"] == str(step)
        assert tags["phi4.checkpoint.latest.manifest_sha256"] == digest
    found = json.loads(store.artifact(run_id, "checkpoints.json", tmp_path))
    # The run went back from step 4 to step 2 and saved step 3 anew.
    assert [(one["step"], one["is_superseded"], one["is_on_disk"]) for one in found] == [
        (2, False, False),
        (4, True, True),
        (3, False, False),
    ]


def test_artifacts_are_sent_once(store, tmp_path, monkeypatch):
    for attempt in (1, 2):
        begun(tmp_path, attempt=attempt)
    run_id, description = store.new_run(), describe(tmp_path)
    send_artifacts(store.client, run_id, description)
    sent = []
    monkeypatch.setattr(store.client, "log_text", lambda _, text, path: sent.append(path))
    send_artifacts(store.client, run_id, description, description)
    (tmp_path / "config.toml").write_text("[run]\n")
    begun(tmp_path, attempt=3)
    send_artifacts(store.client, run_id, describe(tmp_path), description)
    # Another process, which does not know what was sent.
    send_artifacts(store.client, run_id, description)
    assert sent == ["config.toml", "about/0000003.json"]


def test_kind_that_a_user_chose_stays(store):
    chosen = store.client.create_experiment("chosen")
    store.client.set_experiment_tag(chosen, "mlflow.experimentKind", "genai_development")
    for experiment_id in (chosen, store.experiment_id):
        mark_experiment(store.client, experiment_id)
    kinds = [
        store.client.get_experiment(one).tags["mlflow.experimentKind"]
        for one in (chosen, store.experiment_id)
    ]
    assert kinds == ["genai_development", "custom_model_development"]


def test_source_that_is_trained_on_and_held_out_is_two_datasets(store):
    run_id = store.new_run()
    facts = about(sources=(source("web"),), held_out=(source("web"), source("books", "b" * 64)))
    for _ in range(2):
        log_datasets(store.client, run_id, facts)
    found = store.client.get_run(run_id).inputs.dataset_inputs
    assert sorted((one.dataset.name, one.tags[0].value) for one in found) == [
        ("books", "evaluation"),
        ("web", "training"),
        ("web (held out)", "evaluation"),
    ]
    assert {len(one.dataset.digest) for one in found} == {36}


TEXTS = st.text(max_size=40)


@given(st.dictionaries(TEXTS, TEXTS | st.just("long " * 2000), max_size=5))
@settings(
    max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_any_tag_is_taken_and_read_back(store, values):
    tags = as_tags({f"phi4.{key}": value for key, value in values.items()})
    run_id = store.new_run()
    for key, value in tags.items():
        store.client.set_tag(run_id, key, value)
    assert tags.items() <= store.tags(run_id).items()


def test_requests_are_as_large_as_mlflow_takes():
    assert list(map(len, batches(range(250)))) == [100, 100, 50]


def test_names_keep_what_mlflow_takes():
    assert mlflow_name("held_out_loss/a b:c") == "held_out_loss/a b_c"
