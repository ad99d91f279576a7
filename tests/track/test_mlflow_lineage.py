"""Which runs belong to one model or sweep in MLflow."""

import mlflow
import pytest

from phi4.rundir.about import Origins
from phi4.rundir.mlflow_ids import MlflowIds, read_mlflow_ids, write_mlflow_ids
from phi4.track.mlflow.describer import Describer
from phi4.track.mlflow.lineage import PARENT_TAG, lineage_tags, settle_parent
from tests.support.abouts import about, begun, source
from tests.support.mlflow_stores import Store


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store(tmp_path_factory.mktemp("store"))


def test_run_without_origin_has_a_parent_of_its_own_that_is_found_again(store, tmp_path):
    parent = store.parent_of(tmp_path / "a")
    # A kill came before the parent's id was written down.
    assert store.parent_of(tmp_path / "a") == parent
    assert store.parent_of(tmp_path / "b") != parent
    assert store.client.get_run(parent).info.run_name == "a run"


@pytest.mark.parametrize("part", ["", "checkpoints", "checkpoints/step_0000002"])
@pytest.mark.parametrize("key", ["init_from", "continue_from", "reference", "weights"])
def test_run_joins_the_parent_of_where_it_comes_from(store, tmp_path, key, part):
    parent = store.new_run()
    earlier = store.new_run(tmp_path / "earlier", parent)
    origins = Origins(**{key: str(tmp_path / "earlier" / part)})
    assert store.parent_of(tmp_path / "later", origins=origins) == parent
    name = "init_from" if key == "weights" else key
    tags = lineage_tags(about(origins=origins), uri=store.uri)
    assert tags == {f"phi4.{name}.run_id": earlier}


def test_run_joins_through_one_that_nobody_tracked(store, tmp_path):
    parent = store.new_run()
    store.new_run(tmp_path / "first", parent)
    begun(tmp_path / "untracked", origins=Origins(init_from=str(tmp_path / "first")))
    origins = Origins(init_from=str(tmp_path / "untracked"))
    assert store.parent_of(tmp_path / "later", origins=origins) == parent
    assert lineage_tags(about(origins=origins), uri=store.uri) == {}


def test_runs_that_name_each_other_come_to_an_end(store, tmp_path):
    for name, other in (("a", "b"), ("b", "a")):
        begun(tmp_path / name, origins=Origins(init_from=str(tmp_path / other)))
    origins = Origins(init_from=str(tmp_path / "a"))
    assert store.parent_of(tmp_path / "c", origins=origins)


@pytest.mark.parametrize("why", ["other store", "deleted parent", "no parent", "no such place"])
def test_run_that_cannot_join_gets_its_own_parent(store, tmp_path, why):
    earlier, parent = tmp_path / "earlier", store.new_run()
    if why == "other store":
        earlier.mkdir()
        ids = MlflowIds(uri="http://other", experiment_id="1", run_id="r", parent_run_id=parent)
        write_mlflow_ids(earlier, ids)
    elif why == "deleted parent":
        store.new_run(earlier, parent)
        store.client.delete_run(parent)
    elif why == "no parent":
        store.new_run(earlier)
    found = store.parent_of(tmp_path / "later", origins=Origins(init_from=str(earlier)))
    assert found != parent
    assert store.client.get_run(found).data.tags["phi4.model_of"] == "later"


def test_runs_of_a_sweep_have_one_parent_whatever_they_come_from(store, tmp_path):
    earlier = store.new_run(tmp_path / "earlier", store.new_run())
    origins = Origins(init_from=str(tmp_path / "earlier"))
    recipe = {"tracking.sweep": "mixtures"}
    parents = {
        store.parent_of(tmp_path / name, uid=name, name=name, origins=origins, recipe=recipe)
        for name in "abc"
    }
    (parent,) = parents
    assert parent not in (earlier, store.parent_of(tmp_path / "other", uid="other"))
    run = store.client.get_run(parent)
    assert (run.info.run_name, run.data.tags["phi4.sweep"]) == ("mixtures", "mixtures")
    other = store.parent_of(tmp_path / "d", recipe={"tracking.sweep": "the rates' sweep"})
    assert other != parent


def test_of_two_parents_that_were_made_at_once_the_older_counts(store, tmp_path, monkeypatch):
    recipe = {"tracking.sweep": "mixtures"}
    first = store.parent_of(tmp_path / "a", recipe=recipe)
    search, empty = store.client.search_runs, [[]]
    monkeypatch.setattr(
        store.client, "search_runs", lambda *a, **k: empty.pop() if empty else search(*a, **k)
    )
    assert store.parent_of(tmp_path / "b", recipe=recipe, unix_seconds=2e9) == first
    monkeypatch.undo()
    found = store.client.search_runs([store.experiment_id], "tags.`phi4.sweep` = 'mixtures'")
    assert [run.info.run_id for run in found] == [first]


def test_parent_follows_its_newest_child(store, tmp_path):
    parent = store.parent_of(tmp_path)
    first, second = (
        store.client.create_run(store.experiment_id, start_time=ms, tags={PARENT_TAG: parent})
        for ms in (1000, 2000)
    )

    def status_after(run: mlflow.entities.Run, status: str) -> str:
        store.client.update_run(run.info.run_id, status=status)
        settle_parent(store.client, parent)
        return store.client.get_run(parent).info.status

    assert status_after(second, "RUNNING") == "RUNNING"
    assert status_after(first, "FAILED") == "RUNNING"
    assert status_after(second, "KILLED") == "KILLED"
    assert status_after(second, "RUNNING") == "RUNNING"
    assert status_after(second, "FINISHED") == "FINISHED"


def test_describer_notes_the_parent_and_says_nothing_twice(store, tmp_path, monkeypatch):
    begun(tmp_path, sources=(source("web"),))
    run_id = store.new_run(tmp_path)
    describer = Describer(
        tmp_path, store.client, uri=store.uri, experiment_id=store.experiment_id, run_id=run_id
    )
    describer.update()
    assert store.tags(run_id)[PARENT_TAG] == read_mlflow_ids(tmp_path).parent_run_id
    for call in ("get_run", "log_batch", "set_tag", "log_inputs", "log_text", "list_artifacts"):
        monkeypatch.setattr(store.client, call, lambda *_, call=call, **__: pytest.fail(call))
    describer.update()
