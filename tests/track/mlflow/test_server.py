"""The whole way to a real `mlflow server` that dies meanwhile."""

import math

import pytest

from phi4.config import with_overrides
from phi4.track.mlflow import MlflowTracker, replay
from tests.support.tracked_runs import TrackedDir
from tests.support.waiting import LONG_SECONDS, wait_until
from tools.tracking_server import tracking_server


@pytest.mark.slow
def test_server_that_dies_gets_every_step_once(tmp_path):
    with tracking_server(tmp_path / "server") as server:
        run = TrackedDir(tmp_path / "runs" / "one", uri=server.uri, experiment="a")
        run.begin()
        tracker = MlflowTracker(run.wish, run.said.append, patience_seconds=LONG_SECONDS)
        tracker.start({}, [])
        run.train(range(1, 5), broken=math.nan, infinite=-math.inf)
        wait_until(lambda: tracker._arrived == 4, "four steps")
        server.kill()
        run.train(range(5, 7))
        wait_until(lambda: "Connection refused" in " ".join(run.said), "the line about it")
        run.log.rewind(3)
        run.train(range(4, 11), rolled_back_from=6, roll_backs=1)
        server.start()
        run.end("finished")
        tracker.finish("finished")
        run.write_recipe(with_overrides(run.recipe, ["tracking.experiment=b"]))
        replay(run.run_dir, run.said.append)
        run.client_uri = server.uri
        assert run.steps() == list(range(1, 11))
        assert run.steps("after_rollback_1/loss") == [4]
        assert all(math.isnan(m.value) for m in run.history("broken") + run.history("infinite"))
        assert run.run().info.status == "FINISHED"
    [line] = [text for text in run.said if "Connection refused" in text]
    assert line.startswith(f"MLflow at {server.uri}: Connection refused; expected a tracking serv")
    assert run.said[-1].endswith("has all 10 steps (0 points were missing); its status is FINISHED")
