"""Reading ahead changes nothing that anybody sees."""

import threading
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phi4.config import DataConfig
from phi4.data.stream.loader import Loader
from phi4.data.stream.read_ahead import ReadAheadLoader
from phi4.errors import DataError
from tests.data.conftest import FACTS, write_numbered
from tests.data.test_loader import SECOND_SOURCE, data_config
from tests.support.waiting import wait_until

SIZES = {"global_batch_size": 4, "micro_batch_size": 2, "dp_rank": 0, "dp_size": 1}
OTHER_SIZES = SIZES | {"dp_rank": 1, "dp_size": 2}
ACTIONS = ("step", "step", "other step", "state", "back", "skip", "row", "describe", "epochs")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    """Two sources; the first may be read five times."""
    root = tmp_path_factory.mktemp("read_ahead")
    paths = {
        "a": (write_numbered(root / "a", [9, 1, 30, 17, 4], 2), 0.6),
        "b": (write_numbered(root / "b", [50, 3, 12], SECOND_SOURCE), 0.4),
    }
    config = data_config(paths)
    first, second = config.sources
    limited = first.model_copy(update={"max_epochs": 5})
    return config.model_copy(update={"sources": (limited, second)})


def _done(loader: Loader, action: str, states: list[dict[str, Any]]) -> object:
    """What an action gives, comparable; an error is its message."""
    try:
        match action:
            case "step" | "other step":
                batches = loader.next_step(**(SIZES if action == "step" else OTHER_SIZES))
                return [b.tokens.tolist() + b.labels.tolist() for b in batches]
            case "state":
                states.append(loader.state())
                return states[-1]
            case "back":
                return loader.go_to(states[-1] if states else None)
            case "skip":
                return loader.skip(2)
            case "row":
                return loader.row(3).tokens.tolist()
            case "describe":
                return loader.describe_row(1)
            case _:
                return loader.require_epochs(8)
    except DataError as error:
        return str(error)


@settings(max_examples=30, deadline=None)
@given(actions=st.lists(st.sampled_from(ACTIONS), max_size=14))
def test_it_serves_and_says_what_a_loader_does(data: DataConfig, actions: list[str]) -> None:
    plain, ahead = (kind(data, FACTS, 7) for kind in (Loader, ReadAheadLoader))
    states: tuple[list, list] = ([], [])
    for action in actions:
        wanted, found = _done(plain, action, states[0]), _done(ahead, action, states[1])
        assert found == wanted
        if isinstance(wanted, str):
            break
        assert ahead.state() == plain.state()


def test_the_next_step_is_read_before_it_is_asked_for(
    data: DataConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, names = threading.Semaphore(0), []
    next_step = Loader.next_step

    def counted(self: Loader, **sizes: int) -> list:
        names.append(threading.current_thread().name)
        batches = next_step(self, **sizes)
        made.release()
        return batches

    monkeypatch.setattr(Loader, "next_step", counted)
    loader = ReadAheadLoader(data, FACTS, 7)
    loader.next_step(**SIZES)
    wait_until(lambda: made.acquire(blocking=False), "the first step")
    wait_until(lambda: made.acquire(blocking=False), "the step ahead")
    assert names == ["MainThread", "read ahead"]
    loader.next_step(**SIZES)
    assert names[:2] == ["MainThread", "read ahead"] and "MainThread" not in names[1:]


def test_an_error_comes_with_its_step(data: DataConfig) -> None:
    plain, ahead = (kind(data, FACTS, 7) for kind in (Loader, ReadAheadLoader))
    served = 0
    with pytest.raises(DataError) as wanted:
        while True:
            plain.next_step(**SIZES)
            served += 1
    steps = [np.concatenate([b.tokens for b in ahead.next_step(**SIZES)]) for _ in range(served)]
    assert len(steps) == served > 3
    with pytest.raises(DataError) as found:
        ahead.next_step(**SIZES)
    assert str(found.value) == str(wanted.value)
