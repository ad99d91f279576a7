"""The load proof's clients against a model that is known: what they count, and what they leave.

`make prove-serve-load` asks `phi4 serve` of a real model for more and for longer.
"""

import asyncio
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from phi4.data.vocabulary.tokenizer import Tokenizer
from phi4.serve.traffic import ModelChange
from tests.support.served import LoadedSampler, Served, served
from tests.support.waiting import LONG_SECONDS
from tools.load_clients import MANNERS, Server
from tools.serve_load import Sizes, faults, measure_patient, measure_reload, measure_rude

TOKENIZER = Tokenizer({bytes([value]): value for value in range(256)})
SMALL = Sizes(streams=8, seconds=0.3, warm_up=0, requests=60, max_tokens=40)
GOOD = {
    "patient": {"errors": {}},
    "rude": {"errors": {}, "blocks_in_use": 0.0, "open": 0.0, "growth": 0.05},
    "reload": {
        "errors": {},
        "requests_before": 3,
        "reloads": 1.0,
        "changed": 2,
        "equal_fresh": 2,
        "compared": 2,
    },
}


class Model:
    """Draws one of two letters; others after a change."""

    def __init__(self) -> None:
        self.first = 65

    def __call__(self, ids: tuple[int, ...]) -> Mapping[int, float]:
        return {self.first: 0.5, self.first + 1: 0.5}


@contextmanager
def asked(model: Model) -> Iterator[tuple[Server, Served, LoadedSampler]]:
    sampler = LoadedSampler(model, TOKENIZER)
    with served(sampler, TOKENIZER, max_open=1000) as server:
        where = urlsplit(server.url)
        yield Server(where.hostname, where.port, server.model.name), server, sampler


def test_clients_of_every_manner_leave_nothing_behind() -> None:
    with asked(Model()) as (where, server, sampler):
        found = asyncio.run(measure_rude(where, SMALL, lambda: 1 << 20))
        assert (found["errors"], found["blocks_in_use"], found["open"]) == ({}, 0, 0)
        assert sum(found["manners"].values()) == SMALL.requests
        assert found["manners"].keys() == MANNERS.keys()
        counts, manners = server.traffic.counts, found["manners"]
        num_sure = manners["whole"] + manners["slow"] + manners["leaves"]
        # A silent one may be gone before its request is read.
        num_ended = counts.completed + counts.cancelled
        assert num_sure <= num_ended <= num_sure + manners["silent"]
        assert counts.failed == counts.refused == 0
        assert not sampler._open and not server.traffic.num_open


def test_streams_are_timed_to_their_last_token() -> None:
    with asked(Model()) as (where, server, _):
        found = asyncio.run(measure_patient(where, SMALL))
        assert found["errors"] == {} and found["requests"] == server.traffic.counts.completed
        for name in ("first_token_ms", "between_tokens_ms"):
            assert 0 < found[name]["p50"] <= found[name]["p99"]


def test_no_stream_fails_while_the_weights_change() -> None:
    model = Model()
    with asked(model) as (where, server, _):

        def become_other() -> str:
            model.first = 97
            return "step_0000200"

        def publish() -> Path:
            server.traffic.change(ModelChange(become_other))
            return Path("checkpoints/step_0000200")

        found = asyncio.run(measure_reload(where, SMALL, publish))
        assert found["errors"] == {} and found["requests_after"] >= 2 * SMALL.streams
        assert found["changed"] == len(found["after"])
        assert {i for ids in found["after"] for i in ids} == {97, 98}


def test_server_that_refuses_is_an_error_of_its_streams() -> None:
    with asked(Model()) as (where, _, _):
        found = asyncio.run(measure_patient(where._replace(model="another"), SMALL))
        [message] = found["errors"]
        assert "404" in message and "another" in message and found["requests"] == 0


@pytest.mark.parametrize(
    ("part", "name", "value", "said"),
    [
        ("patient", "errors", {"x": 1}, "errors of patient streams: {'x': 1}"),
        ("rude", "errors", {"x": 1}, "errors of rude requests that read all: {'x': 1}"),
        ("rude", "blocks_in_use", 2.0, "2 blocks in use"),
        ("rude", "open", 1.0, "1 requests open"),
        ("rude", "growth", 0.051, "memory grew by 5.1%"),
        ("reload", "errors", {"x": 1}, "errors while weights changed: {'x': 1}"),
        ("reload", "requests_before", 0, "no stream was there when the weights changed"),
        ("reload", "reloads", 0.0, "0 reloads"),
        ("reload", "changed", 1, "tokens did not change"),
        ("reload", "equal_fresh", 1, "1 of 2 answers as a fresh server's"),
    ],
)
def test_every_fault_turns_the_proof_red(part: str, name: str, value: Any, said: str) -> None:
    assert faults(GOOD) == []
    row = deepcopy(GOOD)
    row[part][name] = value
    assert faults(row) == [said]


@pytest.mark.slow
def test_proof_holds_in_its_smallest_form(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    words = ("--streams=8", "--seconds=3", "--warm-up=40", "--requests=40", f"--json={rows}")
    command = [sys.executable, "-m", "tools.serve_load", *words]
    subprocess.run(command, check=True, timeout=LONG_SECONDS)
    [row] = map(json.loads, rows.read_text().splitlines())
    assert row["passed"] and row["reload"]["equal_fresh"] == row["reload"]["compared"] > 0
