"""Run directories as `phi4 train` leaves them, and what MLflow's own client reads of them."""

import shutil
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import mlflow
from mlflow.entities import Metric, Run

from phi4.config import Recipe, dump_toml, parse_recipe
from phi4.rundir.lease import Lease, take_lease
from phi4.rundir.mlflow_ids import read_mlflow_ids
from phi4.rundir.names import CONFIG_FILE, METRICS_FILE
from phi4.rundir.step_log import StepLog
from phi4.track.mlflow.address import connect
from phi4.track.mlflow.follower import Follower
from phi4.track.mlflow.store import MlflowStore
from phi4.track.mlflow.wish import TrackingWish, wish_of


@cache
def _empty_store() -> Path:
    """A sqlite store without runs: making one takes a second of CPU time."""
    path = Path(mkdtemp()) / "mlflow.db"
    connect(f"sqlite:///{path}").search_experiments()
    return path


class TrackedDir:
    """A run directory beside an empty sqlite store, and whoever trains in it.

    Args:
        run_dir: made here.
        num_steps: run.steps.
        tracking: of the recipe.
    """

    def __init__(self, run_dir: Path, num_steps: int = 10, **tracking: str) -> None:
        run_dir.mkdir(parents=True)
        shutil.copy(_empty_store(), run_dir.parent / "mlflow.db")
        self.run_dir, self.said, self.clock = run_dir, [], 1000
        tree = {"run": {"dir": str(run_dir), "steps": num_steps}, "tracking": tracking}
        self.write_recipe(parse_recipe(tree))
        self.lease: Lease | None = None
        self.client_uri = f"sqlite:///{run_dir.parent / 'mlflow.db'}"

    def write_recipe(self, recipe: Recipe) -> None:
        self.recipe = recipe
        (self.run_dir / CONFIG_FILE).write_text(dump_toml(recipe))

    @property
    def wish(self) -> TrackingWish:
        return wish_of(self.recipe, self.run_dir)

    def begin(self, resume_step: int = 0) -> None:
        """An attempt begins, and cuts what happens again."""
        self.lease = take_lease(self.run_dir, job="", say=self.said.append)
        self.lease.begin()
        self.log = StepLog(self.run_dir / METRICS_FILE, resume_step, self.said.append)

    def train(self, steps: Iterable[int], **numbers: float) -> None:
        """Lines of steps; a loss of 1/step unless another one is given."""
        for step in steps:
            self.clock += 1
            line = {"loss": 1 / step, "unix_seconds": float(self.clock), "attempt": 1, **numbers}
            self.log.log(step, line)
            numbers = {k: v for k, v in numbers.items() if k not in _ONCE}

    def end(self, outcome: str = "", **fields: object) -> None:
        """The attempt ends with a word, or as if it was killed."""
        if outcome:
            self.lease.conclude(outcome, **fields)
        self.lease.release()

    def follower(self, *, is_training: bool = True) -> Follower:
        """One that has contact with the store."""
        store = MlflowStore(self.wish, is_training=is_training)
        return Follower(self.run_dir, store, self.said.append)

    def follow(self) -> Follower:
        """What an attempt's follower does first."""
        follower = self.follower()
        follower.begin()
        follower.catch_up()
        return follower

    @property
    def client(self) -> mlflow.MlflowClient:
        return mlflow.MlflowClient(self.client_uri)

    def run(self) -> Run:
        """What MLflow has of the run now."""
        return self.client.get_run(read_mlflow_ids(self.run_dir).run_id)

    def history(self, key: str) -> list[Metric]:
        return self.client.get_metric_history(self.run().info.run_id, key)

    def steps(self, key: str = "loss") -> list[int]:
        """Steps of all points of a metric, in the order in which MLflow tells them."""
        return [metric.step for metric in self.history(key)]


_ONCE = ("rolled_back_from", "roll_backs")
