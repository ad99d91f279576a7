"""Whether the cluster starts a run again, from what scontrol says of its job as it ends."""

from pathlib import Path

import pytest

from phi4.launch.slurm.clients import was_preempted

PREEMPTED = "PreemptTime=2026-11-30T20:53:53"


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        # As Slurm 22.05 says them: during the grace time, after it, and after scancel.
        (f"JobState=RUNNING Reason=None {PREEMPTED}", True),
        (f"JobState=COMPLETING Reason=None {PREEMPTED}", True),
        ("JobState=COMPLETING Reason=None PreemptTime=None", False),
        ("JobState=CANCELLED Reason=None PreemptTime=None", False),
        ("JobState=RUNNING Reason=None PreemptTime=None", True),
        ("JobState=COMPLETING Reason=TimeLimit PreemptTime=None", True),
    ],
)
def test_what_slurm_says(tmp_path: Path, monkeypatch, fields: str, expected: bool) -> None:
    scontrol(tmp_path, monkeypatch, f"echo JobId=47 JobName=x {fields} Restarts=0 NodeList=n1")
    assert was_preempted("47") is expected


def test_nobody_knows(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert was_preempted("") is None
    assert was_preempted("47") is None, "there is no scontrol"
    scontrol(tmp_path, monkeypatch, "echo error: Invalid job id specified >&2; false")
    assert was_preempted("47") is None


def scontrol(directory: Path, monkeypatch: pytest.MonkeyPatch, does: str) -> None:
    path = directory / "scontrol"
    path.write_text(f"#!/bin/sh\n{does}\n")
    path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{directory}:/usr/bin:/bin")
