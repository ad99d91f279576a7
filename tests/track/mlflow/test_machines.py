"""Samples of machines in MLflow, read back by its own client: once each, whatever went wrong."""

import os
from types import SimpleNamespace
from unittest.mock import patch

import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from phi4.track.mlflow.system_sampler import SystemSampler
from phi4.track.mlflow.system_samples import last_samples
from tests.support.tracked_runs import TrackedDir

KEY = "system/node_{}/memory_used_bytes"


@pytest.fixture
def run(tmp_path) -> TrackedDir:
    return TrackedDir(tmp_path / "runs" / "one")


def sample(run: TrackedDir, node: int = 0, times: int = 1) -> None:
    for _ in range(times):
        SystemSampler(run.run_dir, node, os.getpid(), SimpleNamespace()).sample()


def test_every_machine_is_a_group_of_system_metrics(run):
    run.begin()
    follower = run.follow()
    sample(run, 0, 2)
    sample(run, 3)
    follower.show_machines()
    assert (run.steps(KEY.format(0)), run.steps(KEY.format(3))) == ([1, 2], [1])
    first = run.history(KEY.format(0))[0]
    assert first.value > 0 and first.timestamp > 1_600_000_000_000


def test_sample_is_sent_once_over_followers_and_failures(run):
    run.begin()
    follower = run.follow()
    sample(run, times=2)
    follower.show_machines()
    sample(run)
    whole = MlflowClient.log_batch

    def stored_but_unanswered(*words: object, **names: object) -> None:
        whole(*words, **names)
        raise MlflowException("no answer")

    unanswered = patch.object(MlflowClient, "log_batch", stored_but_unanswered)
    with unanswered, pytest.raises(MlflowException):
        follower.show_machines()
    sample(run)
    follower.show_machines()
    run.follow().show_machines()
    assert run.steps(KEY.format(0)) == [1, 2, 3, 4]


def test_what_a_store_holds_is_told_from_the_names():
    held = {"loss": 90, "system/node_0/a": 3, "system/node_0/b": 4, "system/node_12/a": 1}
    assert last_samples({**held, "system/other": 7}) == {0: 4, 12: 1}
