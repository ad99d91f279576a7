"""What is sent to MLflow: the law of one point per step, whatever happens to run and server."""

import math
import re
from collections import defaultdict

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from mlflow.utils.validation import _validate_metric_name

from phi4.track.mlflow.points import Point, PointPlan, metric_name, metric_value

BATCH = 3
"""Fewer points than a step has, so that steps are split too."""


class ModelServer:
    """What MLflow does with points: keeps every one that differs, and forgets none."""

    def __init__(self) -> None:
        self.points: dict[str, dict[Point, None]] = defaultdict(dict)
        self.tags: dict[str, str] = {}

    def store(self, batch) -> None:
        assert not (batch.tags and batch.points)
        self.tags |= batch.tags
        for point in batch.points:
            self.points[point.name][point] = None

    def held(self) -> dict[str, int]:
        return {name: max(p.step for p in points) for name, points in self.points.items()}

    def value(self, name: str, step: int) -> float | None:
        found = [p.value for p in self.points.get(name, {}) if p.step == step]
        assert len(found) <= 1, f"{name} has {len(found)} points of step {step}"
        return found[0] if found else None


class ModelRun:
    """A run's record, as `phi4 train` writes it, and the follower that its attempt started.

    The value of a metric is the generation of the data that the step was done with.
    """

    def __init__(self) -> None:
        self.lines: list[dict] = []
        self.server = ModelServer()
        self.generation = self.roll_backs = self.clock = 0
        self.skips: list[tuple[int, int]] = []
        self.start_follower()

    @property
    def step(self) -> int:
        return len(self.lines)

    def start_follower(self) -> None:
        self.plan = PointPlan(self.server.held(), self.server.tags)

    def train(self, num_steps: int) -> None:
        for step in range(self.step + 1, self.step + 1 + num_steps):
            self.clock += 1
            line = {"step": step, "unix_seconds": float(self.clock), "attempt": 1}
            line |= dict.fromkeys(("loss", "grad_norm", "rate"), float(self.generation))
            if step % 3 == 0:
                line["held_out_loss"] = float(self.generation)
            # As phi4.train.meter.roll_back_numbers: it follows from the state.
            undone = [last for after, last in self.skips if after == step - 1]
            if undone:
                line |= {"rolled_back_from": undone[-1], "roll_backs": self.roll_backs}
            self.lines.append(line)

    def roll_back(self, fraction: float) -> None:
        self._go_back(int(self.step * fraction), is_new=True)

    def kill_and_resume(self, fraction: float) -> None:
        step = int(self.step * fraction)
        if self.skips and step < self.skips[-1][0]:
            # An older checkpoint than the one that a roll back went to: other data again.
            self._go_back(step, is_new=False)
        del self.lines[step:]
        self.start_follower()

    def _go_back(self, step: int, *, is_new: bool) -> None:
        last = max([self.step, *(last for after, last in self.skips if after >= step)])
        if last == step:
            return
        self.skips = [skip for skip in self.skips if skip[0] < step] + [(step, last)]
        del self.lines[step:]
        self.roll_backs += is_new
        self.generation += 1

    def follow(self, outcomes: list[str]) -> None:
        """Send batches until one of them has no outcome left, or the record's end."""
        outcomes = [*outcomes]
        while True:
            for batch in self.plan.batches(self.lines, BATCH):
                outcome = outcomes.pop() if outcomes else "ends"
                if outcome in ("arrives", "not acknowledged"):
                    self.server.store(batch)
                if outcome == "ends":
                    return self.start_follower()
                if outcome != "arrives":
                    self.plan.learn(self.server.held(), self.server.tags)
                    break
            else:
                return None

    def replay(self) -> None:
        self.start_follower()
        for batch in self.plan.batches(self.lines, BATCH):
            self.server.store(batch)


FRACTIONS = st.floats(0, 1)
OUTCOMES = st.builds(
    lambda faults, num_arriving: [*faults, *["arrives"] * num_arriving],
    st.lists(st.sampled_from(["arrives", "lost", "not acknowledged"]), max_size=3),
    st.sampled_from([0, 1, 3, 100]),
)
EVENTS = st.lists(
    st.one_of(
        st.tuples(st.just("train"), st.integers(1, 6)),
        st.tuples(st.just("follow"), OUTCOMES),
        st.tuples(st.just("roll_back"), FRACTIONS),
        st.tuples(st.just("kill_and_resume"), FRACTIONS),
    ),
    min_size=4,
    max_size=20,
)


ALL = ("follow", ["arrives"] * 100)
SENT = [("train", 10), ALL]
TWICE_BACK = [*SENT, ("roll_back", 0.4), ("train", 5), ALL, ("roll_back", 0.3), ("train", 12), ALL]
BACK_AND_BEHIND = [*SENT, ("roll_back", 0.4), ("train", 2), ALL, ("kill_and_resume", 0.4)]
"""The checkpoint of the roll back is lost: the run goes on from the one before it."""
KILLED_BEFORE = [*SENT, ("kill_and_resume", 0.5), ("train", 1), ("roll_back", 0.9), ("train", 9)]


@given(EVENTS)
@example(TWICE_BACK)
@example([*BACK_AND_BEHIND, ("train", 12), ALL])
@example(KILLED_BEFORE)
@settings(max_examples=100, deadline=None)
def test_every_accepted_step_has_one_point_of_its_own_data(events):
    run = ModelRun()
    for name, argument in events:
        getattr(run, name)(argument)
    run.train(1)
    run.replay()
    server = run.server
    before = {name: list(points) for name, points in server.points.items()}
    run.replay()
    assert {name: list(points) for name, points in server.points.items()} == before
    for line in run.lines:
        for key in line.keys() - {"step", "unix_seconds", "attempt"}:
            names = [f"after_rollback_{label}/{key}" for label in newest_first(server.tags)]
            values = [server.value(name, line["step"]) for name in (*names, key)]
            found = [value for value in values if value is not None]
            # Below the newest name that has the step are the values of undone steps.
            assert found and found[0] == line[key], (key, line, found)
    for name in list(server.points):
        steps = [point.step for point in server.points[name]]
        assert steps == sorted(set(steps)), name


@given(EVENTS)
@example(TWICE_BACK)
@settings(max_examples=100, deadline=None)
def test_only_steps_that_had_been_sent_are_replaced(events):
    run = ModelRun()
    for name, argument in events:
        getattr(run, name)(argument)
    run.replay()
    for name, points in list(run.server.points.items()):
        if name.startswith("after_rollback_") and name.endswith("/loss"):
            for point in points:
                plain = run.server.value("loss", point.step)
                assert plain is not None and plain < point.value


def test_follower_sends_nothing_twice_by_itself():
    run = ModelRun()
    run.train(10)
    assert len(list(run.plan.batches(run.lines))) == 1
    assert list(run.plan.batches(run.lines)) == []
    run.train(1)
    [batch] = run.plan.batches(run.lines)
    assert {point.step for point in batch.points} == {11} and batch.last_step == 11


def test_steps_are_whole_where_they_fit():
    run = ModelRun()
    run.train(8)
    batches = list(run.plan.batches(run.lines, size=7))
    assert [batch.last_step for batch in batches] == [2, 4, 6, 8]
    assert [len(batch.points) for batch in batches] == [6, 7, 7, 6]


def test_other_writers_metrics_do_not_count_as_steps_of_the_run():
    plan = PointPlan({"loss": 6, "system/node_0/cpu": 500, "users own": 10**9}, {})
    line = {"step": 4, "unix_seconds": 0.5, "rolled_back_from": 7, "roll_backs": 2, "loss": 1.0}
    tags, points = plan.batches([line])
    assert tags.tags == {"rollback_2": "steps 4 to 6"}
    assert points.points[-1] == Point("after_rollback_2/loss", 4, 500, 1.0)


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("loss", "loss"),
        ("held_out_loss/web b:c", "held_out_loss/web b:c"),
        ("a(b)@100", "a_b__100-"),
        ("a[b]@100", "a_b__100-"),
        ("/x//../y", "x/y-"),
        ("..", "-"),
        ("..a", "__a-"),
        ("system/x", "_system/x-"),
        ("after_rollback_1/loss", "_after_rollback_1/loss-"),
        ("k" * 300, "k" * 193 + "-"),
        ("k\n", "k_-"),
    ],
)
def test_names_are_those_that_mlflow_takes(key, name):
    found = metric_name(key)
    assert re.fullmatch(re.escape(name) + ("" if key == name else "[0-9a-f]{6}"), found)
    _validate_metric_name(f"after_rollback_100/{found}")


def test_no_two_keys_have_one_name():
    keys = ["a(b)", "a[b]", "a_b_", "a/b", "a//b", "/a/b", "k" * 300, "k" * 301]
    assert len({metric_name(key) for key in keys}) == len(keys)


def test_value_that_is_not_finite_is_nan():
    assert [metric_value(value) for value in (1, 2.5)] == [1.0, 2.5]
    assert all(math.isnan(metric_value(v)) for v in (math.inf, -math.inf, math.nan))


def newest_first(tags: dict[str, str]) -> list[str]:
    """Labels of the roll backs that the tags tell of; `2_from_3` is later than `2`."""
    labels = [tag.removeprefix("rollback_") for tag in tags if tag.startswith("rollback_")]

    def time_of(label: str) -> tuple[int, float]:
        number, _, first = label.partition("_from_")
        return int(number), -float(first or "inf")

    return sorted(labels, key=time_of, reverse=True)
