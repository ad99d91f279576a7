"""The facts of attempts: written whole, read without those that are damaged."""

from phi4.rundir.about import about_path, read_abouts, uid_of, write_about
from phi4.rundir.mlflow_ids import MlflowIds, read_mlflow_ids, write_mlflow_ids
from tests.support.abouts import about, source


def test_facts_of_all_attempts_are_read_back_in_order(tmp_path):
    written = [about(attempt=number, sources=(source("s"),)) for number in (2, 10_000_000, 1)]
    for one in written:
        write_about(tmp_path, one)
    assert read_abouts(tmp_path) == [written[2], written[0], written[1]]


def test_damaged_and_foreign_files_are_left_out(tmp_path):
    assert read_abouts(tmp_path) == []
    write_about(tmp_path, about())
    about_path(tmp_path, 2).write_text('{"uid": "u"}')
    about_path(tmp_path, 3).write_bytes(b"\xff")
    (tmp_path / "about/notes.txt").write_text("mine")
    assert read_abouts(tmp_path) == [about()]


def test_uid_is_drawn_once(tmp_path):
    assert uid_of(tmp_path) != uid_of(tmp_path)
    first = about(uid=uid_of(tmp_path))
    write_about(tmp_path, first)
    assert uid_of(tmp_path) == first.uid == uid_of(tmp_path)


def test_ids_are_read_back_and_damaged_ones_are_none(tmp_path):
    assert read_mlflow_ids(tmp_path) is None
    ids = MlflowIds(uri="sqlite:////a/b.db", experiment_id="1", run_id="r", parent_run_id="p")
    write_mlflow_ids(tmp_path, ids)
    assert read_mlflow_ids(tmp_path) == ids
    (tmp_path / "mlflow.json").write_text("{")
    assert read_mlflow_ids(tmp_path) is None
