"""What may change when a run goes on, and what the history says of it."""

import pytest

from phi4.errors import ConfigError
from phi4.train.state import Change, RunState, with_changes
from tests.support.engines import tiny_recipe

STATE = RunState(step=7, consumed_tokens=70, data={"units": [1, 2]})


def test_state_survives_its_text() -> None:
    state = RunState(step=3, data={"a": {"b": 1}}, history=(Change(1, "k", "1", "2"),))
    assert RunState.from_json(state.to_json()) == state


def test_free_keys_change_without_a_trace() -> None:
    new = tiny_recipe("parallel.tensor=2", "checkpoint.every=3")
    assert with_changes(STATE, tiny_recipe(), new, allow=False) == STATE


def test_schedule_keys_need_the_flag_and_enter_the_history() -> None:
    new = tiny_recipe("optim.learning_rate=0.5", "run.steps=200")
    with pytest.raises(ConfigError, match=r"optim\.learning_rate=0\.01, now 0\.5.*--change"):
        with_changes(STATE, tiny_recipe(), new, allow=False)
    history = with_changes(STATE, tiny_recipe(), new, allow=True).history
    assert history == (
        Change(7, "optim.learning_rate", "0.01", "0.5"),
        Change(7, "run.steps", "100", "200"),
    )


def test_identity_keys_never_change() -> None:
    with pytest.raises(ConfigError, match=r"run\.seed=1234, now 1.*another run\.dir"):
        with_changes(STATE, tiny_recipe(), tiny_recipe("run.seed=1"), allow=True)
