"""What may change when a run goes on, and what the history says of it."""

import msgspec
import pytest

from phi4.errors import ConfigError
from phi4.rundir.state import Change, RunState
from phi4.train.changes import with_changes
from tests.support.engines import tiny_recipe

STATE = RunState(step=7, consumed_tokens=70, data={"units": [1, 2]})


def unexpected(line: str) -> None:
    pytest.fail(line)


def test_state_survives_its_text() -> None:
    state = RunState(step=3, data={"a": {"b": 1}}, history=(Change(1, "k", 1, [2]),))
    assert RunState.from_json(state.to_json()) == state


def test_histories_of_python_literals_are_still_read() -> None:
    old = [{"step": 1, "key": "k", "old": "'a'", "new": "[{'b': None}]"}]
    text = msgspec.json.encode({"step": 3, "history": old}).decode()
    assert RunState.from_json(text).history == (Change(1, "k", "a", [{"b": None}]),)
    with pytest.raises(msgspec.DecodeError, match="history"):
        RunState.from_json(text.replace("'a'", "print(1)"))


def test_free_keys_change_without_a_trace() -> None:
    new = tiny_recipe("parallel.tensor=2", "checkpoint.every=3")
    assert with_changes(STATE, tiny_recipe(), new, allow=False, say=unexpected) == STATE


def test_schedule_keys_need_the_flag_and_enter_the_history() -> None:
    new = tiny_recipe("optim.learning_rate=0.5", "run.steps=200")
    with pytest.raises(ConfigError, match=r"optim\.learning_rate=0\.01, now 0\.5.*--change"):
        with_changes(STATE, tiny_recipe(), new, allow=False, say=unexpected)
    history = with_changes(STATE, tiny_recipe(), new, allow=True, say=[].append).history
    assert history == (
        Change(7, "optim.learning_rate", 0.01, 0.5),
        Change(7, "run.steps", 100, 200),
    )


def test_identity_keys_never_change() -> None:
    with pytest.raises(ConfigError, match=r"run\.seed=1234, now 1.*another run\.dir"):
        with_changes(STATE, tiny_recipe(), tiny_recipe("run.seed=1"), allow=True, say=unexpected)


def test_fp8_is_what_a_run_is() -> None:
    off, on = tiny_recipe(), tiny_recipe("precision.fp8=torch")
    text = r"precision\.fp8='torch', now 'off'; .* restore the value, or use another run\.dir"
    with pytest.raises(ConfigError, match=text) as refused:
        with_changes(STATE, on, off, allow=True, say=unexpected)
    assert "\n" not in str(refused.value)
    with pytest.raises(ConfigError, match=r"fp8_recipe='tensorwise', now 'rowwise'"):
        rows = tiny_recipe("precision.fp8=torch", "precision.fp8_recipe=rowwise")
        with_changes(STATE, on, rows, allow=True, say=unexpected)


ENDED = RunState(step=100, consumed_tokens=100 * 8 * 32)
WHOLE_RUN = ("optim.decay=0", "optim.learning_rate=6e-3", "optim.min_learning_rate=6e-4")


@pytest.mark.parametrize(
    ("state", "override", "line"),
    [
        (
            ENDED,
            "run.steps=200",
            "learning rate of step 101: 0.0006 before, 0.003314 now; the decay ended after 100 "
            "steps, now after 200; optim.decay=100 keeps the old end",
        ),
        # During warm-up the rate is still the same, but not what follows.
        (
            RunState(),
            "run.steps=50",
            "learning rate of step 1: 0.002 before, 0.002 now; the decay ended after 100 steps, "
            "now after 50; optim.decay=100 keeps the old end",
        ),
        (
            ENDED,
            "optim.decay=200",
            "learning rate of step 101: 0.0006 before, 0.003314 now; the decay ended after 100 "
            "steps, now after 200",
        ),
        (
            ENDED,
            "optim.min_learning_rate=1e-4",
            "learning rate of step 101: 0.0006 before, 0.0001 now",
        ),
    ],
)
def test_a_moved_learning_rate_is_said_with_both_values(
    state: RunState, override: str, line: str
) -> None:
    old, new = tiny_recipe(*WHOLE_RUN), tiny_recipe(*WHOLE_RUN, override)
    said: list[str] = []
    with_changes(state, old, new, allow=True, say=said.append)
    assert said == [line]
    with pytest.raises(ConfigError) as refused:
        with_changes(state, old, new, allow=False, say=unexpected)
    assert f"({line}); pass --change" in str(refused.value)


def test_a_decay_in_tokens_moves_with_the_batch() -> None:
    in_tokens = (*WHOLE_RUN, "optim.schedule_unit=tokens")
    old, new = tiny_recipe(*in_tokens), tiny_recipe(*in_tokens, "batch.global_batch_size=16")
    said: list[str] = []
    with_changes(ENDED, old, new, allow=True, say=said.append)
    (line,) = said
    assert "the decay ended after 25,600 tokens, now after 51,200" in line
    kept = tiny_recipe(*in_tokens, "batch.global_batch_size=16", "optim.decay=25600")
    with_changes(ENDED, old, kept, allow=True, say=unexpected)


def test_what_leaves_the_rate_alone_says_nothing() -> None:
    kept = tiny_recipe(*WHOLE_RUN, "run.steps=200", "optim.decay=100", "optim.clip_grad=2.0")
    with_changes(ENDED, tiny_recipe(*WHOLE_RUN), kept, allow=True, say=unexpected)


def test_number_format_belongs_to_the_training() -> None:
    new = tiny_recipe("precision.dtype=bf16")
    with pytest.raises(ConfigError, match=r"precision\.dtype='fp32', now 'bf16'.*run\.init_from"):
        with_changes(STATE, tiny_recipe(), new, allow=True, say=unexpected)
