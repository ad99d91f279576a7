"""Compare the record of a run with that of an undisturbed one, bit by bit."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import msgspec

from phi4.rundir.checkpoints import find_checkpoint
from phi4.rundir.goodput import goodput_of
from phi4.rundir.names import METRICS_FILE
from phi4.rundir.run_record import read_run
from phi4.rundir.state import read_state
from phi4.rundir.step_log import read_metrics

TIME_TOLERANCE = 0.005
"""Allowed difference between the wall time and the sum of all attempts' buckets, as a fraction."""

COMPARED = ("loss", "grad_norm", "learning_rate", "consumed_tokens", "held_out_loss")


@dataclass(frozen=True)
class DrilledRun:
    """A finished run.

    Attributes:
        steps: the record, by step.
        stream_sha256: hash of the data ledger after the last step, which determines what was drawn
            from every source and the next position.
    """

    steps: dict[int, dict[str, float]]
    stream_sha256: str

    @property
    def final_loss(self) -> float:
        """Loss of the last step."""
        return self.steps[max(self.steps)]["loss"]


def read_record(run_dir: Path) -> DrilledRun:
    """Read the record of a finished run."""
    steps = {int(line["step"]): line for line in read_metrics(run_dir / METRICS_FILE)}
    data = read_state(find_checkpoint(run_dir)).data
    return DrilledRun(steps, hashlib.sha256(msgspec.json.encode(data, order="sorted")).hexdigest())


def differences(undisturbed: DrilledRun, found: DrilledRun) -> list[str]:
    """Return one line per number that differs; skipped evaluations have no number."""
    lines = [
        f"step {step}: {key} {line[key]!r} undisturbed, {found.steps[step].get(key)!r} after faults"
        for step, line in undisturbed.steps.items()
        if step in found.steps
        for key in COMPARED
        if key in line
        and line[key] != found.steps[step].get(key, line[key] if key == "held_out_loss" else None)
    ]
    if undisturbed.steps.keys() != found.steps.keys():
        lines.append(f"steps recorded: {sorted(found.steps)}")
    if undisturbed.stream_sha256 != found.stream_sha256:
        lines.append(f"data stream: {undisturbed.stream_sha256} undisturbed, {found.stream_sha256}")
    return lines


def missing_time(run_dir: Path) -> list[str]:
    """Return a line if the buckets of a run do not sum to its wall time."""
    goodput = goodput_of(read_run(run_dir))
    counted, wall = sum(goodput.seconds.values()), goodput.wall_seconds
    if wall > 0 and abs(counted - wall) <= TIME_TOLERANCE * wall:
        return []
    return [f"wall time: {wall:.2f} s, and {counted:.2f} s in the buckets of all attempts"]
