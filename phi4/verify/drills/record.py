"""What a run left behind, compared with what an undisturbed one left, bit by bit."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import msgspec

from phi4.rundir.checkpoints import find_checkpoint
from phi4.rundir.names import METRICS_FILE
from phi4.rundir.state import read_state
from phi4.rundir.step_log import read_metrics

COMPARED = ("loss", "grad_norm", "learning_rate", "consumed_tokens", "held_out_loss")


@dataclass(frozen=True)
class RunRecord:
    """A finished run.

    Attributes:
        steps: the record, by step.
        stream_sha256: of the data ledger after the last step, which says what was drawn from every
            source and where it goes on.
    """

    steps: dict[int, dict[str, float]]
    stream_sha256: str

    @property
    def final_loss(self) -> float:
        """Of the last step."""
        return self.steps[max(self.steps)]["loss"]


def read_record(run_dir: Path) -> RunRecord:
    """What a finished run left."""
    steps = {int(line["step"]): line for line in read_metrics(run_dir / METRICS_FILE)}
    data = read_state(find_checkpoint(run_dir)).data
    return RunRecord(steps, hashlib.sha256(msgspec.json.encode(data, order="sorted")).hexdigest())


def differences(undisturbed: RunRecord, found: RunRecord) -> list[str]:
    """One line per number that differs; an evaluation that was left has no number."""
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
