"""The verdict on a run whose layout changed on the way can fail, in each of its parts."""

import json
from pathlib import Path

import pytest

from phi4.rundir.names import METRICS_FILE
from tools import slurm_undisturbed

CHANGED_AFTER = 2


def _run(directory: Path, **changes: tuple[int, float]) -> Path:
    """Four steps, in which key=(step, value) differs."""
    directory.mkdir()
    with (directory / METRICS_FILE).open("w") as file:
        for step in range(1, 5):
            line = {"step": step, "loss": 5.0, "grad_norm": 1.0, "learning_rate": 0.1}
            line["consumed_tokens"] = 10 * step
            line |= {key: value for key, (at, value) in changes.items() if at == step}
            file.write(json.dumps(line) + "\n")
    return directory


@pytest.mark.parametrize(
    ("changes", "ledger", "said"),
    [
        ({"loss": (3, 5.000001)}, b"a", ""),
        ({"loss": (3, 5.001)}, b"a", "losses differ by 2.0e-04"),
        ({"grad_norm": (2, 1.0000001)}, b"a", "step 2, before the change of layout, differs"),
        ({"consumed_tokens": (4, 41)}, b"a", "another stream of samples"),
        ({}, b"b", "another stream of samples"),
    ],
)
def test_what_a_change_of_layout_may_change(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, tuple[int, float]],
    ledger: bytes,
    said: str,
) -> None:
    undisturbed, found = _run(tmp_path / "undisturbed"), _run(tmp_path / "found", **changes)
    ledgers = {undisturbed: {2: b"a"}, found: {2: ledger, 3: b"a"}}
    monkeypatch.setattr(slurm_undisturbed, "_ledgers", ledgers.__getitem__)
    assert slurm_undisturbed.compared(undisturbed, found).wrong(CHANGED_AFTER) == said
