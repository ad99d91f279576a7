"""The record and its views, and what a recipe opens."""

import json

import pytest

from phi4.config import parse_recipe
from phi4.rundir.step_log import read_metrics
from phi4.track import Trackers, open_trackers, recipe_params


class Memory:
    """A tracker that notes its calls, and raises in those it is told to."""

    def __init__(self, *fails_in: str) -> None:
        self.calls: list[str] = []
        self._fails_in = fails_in

    def _note(self, call: str) -> None:
        self.calls.append(call)
        if call in self._fails_in:
            raise OSError(f"no {call}")

    def start(self, params, artifacts):
        self._note("start")

    def log(self, step, metrics):
        self._note(f"log {step}{' again' if 'rolled_back_from' in metrics else ''}")

    def rewind(self, step):
        self._note(f"rewind {step}")

    def finish(self, status):
        self._note(f"finish {status}")


WHOLE_RUN = ["start", "log 1", "log 2", "rewind 1", "log 2 again", "finish finished"]


def follow(trackers: Trackers) -> None:
    trackers.start({"run.seed": 1})
    trackers.log(1, {"loss": 1.0})
    trackers.log(2, {"loss": 1.0})
    trackers.rewind(1)
    trackers.log(2, {"loss": 1.0, "rolled_back_from": 2.0})
    trackers.finish("finished")


@pytest.mark.parametrize("call", WHOLE_RUN)
def test_failing_view_is_said_once_and_left_out(call):
    record, broken, whole, said = Memory(), Memory(call), Memory(), []
    follow(Trackers(record, [broken, whole], said.append))
    assert record.calls == whole.calls == WHOLE_RUN
    assert broken.calls == WHOLE_RUN[: WHOLE_RUN.index(call) + 1]
    assert len(said) == 1 and f"OSError: no {call}" in said[0] and "Memory failed" in said[0]


def test_failing_record_stops_training_and_its_views_are_closed():
    view = Memory()
    trackers = Trackers(Memory("log 1", "finish failed"), [view], print)
    with pytest.raises(OSError, match="no log 1"):
        trackers.log(1, {})
    with pytest.raises(OSError, match="no finish failed"):
        trackers.finish("failed")
    assert view.calls == ["finish failed"]


def test_only_the_writer_touches_the_run_directory(tmp_path, capsys):
    recipe = parse_recipe({"run": {"dir": str(tmp_path / "run")}})
    follow(open_trackers(recipe, resume_step=0, is_writer=False))
    assert not (tmp_path / "run").exists() and not capsys.readouterr().out


def test_recipe_without_mlflow_opens_file_and_console(tmp_path, capsys):
    tree = {"run": {"dir": str(tmp_path / "run"), "steps": 2}, "tracking": {"mlflow": False}}
    follow(open_trackers(parse_recipe(tree), resume_step=0, is_writer=True))
    assert [line["step"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl")] == [1, 2]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("step 1/2  loss 1.0000")
    assert [line.split("  ")[-1] for line in lines if "rolled back" in line] == [
        "rolled back from step 2"
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_params_are_flat_and_whole():
    source = {"name": "code", "path": "a", "weight": 0.5}
    params = recipe_params(parse_recipe({"data": {"sources": [source]}}))
    assert params["parallel.tensor"] == 1 and params["run.name"] is None
    assert json.loads(params["data.sources"])[0]["name"] == "code"
