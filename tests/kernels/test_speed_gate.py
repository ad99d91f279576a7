"""The speed gate between implementations: what its row says, and that `auto` reads it."""

import json
from pathlib import Path

import pytest
import torch
from phi4_kernels import dispatch
from phi4_kernels.bench import speed_gate


@pytest.mark.parametrize(
    ("ratios", "faster"),
    [
        ({"a": 0.5, "b": 0.99}, True),
        ({"a": 0.5, "b": 1.0}, False),
        ({"a": 1.2}, False),
        ({}, False),
    ],
)
def test_a_candidate_must_be_faster_everywhere(ratios: dict[str, float], faster: bool) -> None:
    assert speed_gate.verdict("attention", "gluon", ratios)["faster"] is faster


def test_auto_reads_the_row_that_the_speed_gate_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "speed.jsonl"
    monkeypatch.setattr(dispatch, "SPEED_ROWS", path)
    row = speed_gate.verdict("attention", "gluon", {"t4096/forward": 0.8}) | {"device": "H200"}
    path.write_text(json.dumps(row) + "\n")
    assert dispatch.known().is_faster("attention", "gluon", "H200")
    assert not dispatch.known().is_faster("attention", "gluon", "H100")


@pytest.mark.skipif(torch.cuda.is_available(), reason="the machine has a GPU")
def test_without_a_gpu_nothing_is_timed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr("sys.argv", ["speed_gate", "--op", "attention"])
    assert speed_gate.main() == 2
    assert "nothing was timed" in capsys.readouterr().out
