"""The drills of preemption and kills: what they take for a failure, and their smallest form."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from random import Random
from types import SimpleNamespace

import numpy as np
import pytest

from phi4.config import dump_toml
from phi4.data.files.token_writer import TokenFileWriter
from phi4.verify.drills.drill import DrillPace, Moment
from phi4.verify.drills.faults import Kill, Notice
from phi4.verify.drills.record import DrilledRun, differences
from tests.support.byte_source import write_byte_tokenizer
from tests.support.engines import tiny_recipe
from tests.support.waiting import LONG_SECONDS

STOPPED = "stopped after step 5 of 12: stopped by a signal"
PUT_OFF = "the save of step 3 is put off until that of step 2 is durable"
AT_START = "stopped before the first step: stopped by a signal"


@pytest.mark.parametrize(
    ("output", "code", "before", "after", "wrong"),
    [
        (STOPPED, 5, {3}, {3, 5}, ""),
        (STOPPED, 5, set(), {3, 5}, ""),
        (STOPPED, 5, {3}, {3}, "stopped after step 5, new checkpoints []"),
        (STOPPED, 5, {3}, {3, 4, 5}, "stopped after step 5, new checkpoints [4, 5]"),
        (STOPPED, 5, {3}, {3, 5, 6}, "stopped after step 5, new checkpoints [5, 6]"),
        (
            f"the save of step 3 is put off until that of step 2 is durable\n{STOPPED}",
            5,
            set(),
            {3, 4, 5},
            "",
        ),
        (STOPPED, 143, {3}, {3, 5}, "exit code 143"),
        (STOPPED, 0, {3}, {3, 5}, "exit code 0"),
        ("step 5/12", 5, {3}, {3, 5}, "no line says where it stopped"),
        (AT_START, 5, {3}, {3}, ""),
        (AT_START, 5, {3}, {3, 4}, "saved [4] without a step"),
    ],
)
def test_verdict_on_a_notice(
    output: str, code: int, before: set[int], after: set[int], wrong: str
) -> None:
    attempt = SimpleNamespace(output=lambda: f"{output}\n")
    assert Notice().verdict(attempt, code, before, after) == wrong


@pytest.mark.parametrize(
    ("code", "before", "after", "wrong"),
    [
        (137, {3}, {3}, ""),
        (137, set(), set(), ""),
        (1, {3}, {3}, "exit code 1"),
        (137, {3, 6}, {3}, "checkpoint of step 6 is gone"),
    ],
)
def test_verdict_on_a_kill(code: int, before: set[int], after: set[int], wrong: str) -> None:
    assert Kill().verdict(SimpleNamespace(), code, before, after) == wrong


def test_any_bit_that_differs_is_found_and_an_evaluation_that_was_left_is_none() -> None:
    line = {"step": 2, "loss": 5.0, "grad_norm": 1.0, "held_out_loss": 4.0}
    expected = DrilledRun({1: {"loss": 6.0}, 2: line}, "abc")
    left = {key: value for key, value in line.items() if key != "held_out_loss"}
    assert differences(expected, DrilledRun({1: {"loss": 6.0}, 2: left}, "abc")) == []
    other = np.nextafter(5.0, 6.0)
    for found, said in [
        (DrilledRun({1: {"loss": 6.0}, 2: line | {"loss": other}}, "abc"), "step 2: loss 5.0"),
        (DrilledRun({1: {"loss": 6.0}, 2: line | {"held_out_loss": 4.5}}, "abc"), "held_out"),
        (DrilledRun({1: {}, 2: line}, "abc"), "step 1: loss"),
        (DrilledRun({2: line}, "abc"), "steps recorded: [2]"),
        (DrilledRun(expected.steps, "abd"), "data stream: abc"),
    ]:
        (difference,) = differences(expected, found)
        assert said in difference


def test_moments_are_of_every_phase_and_of_the_seed() -> None:
    pace = DrillPace(start=10.0, step=2.0)
    moments = [Moment.drawn(Random(seed), pace) for seed in range(50)]
    assert {moment.phase for moment in moments} == {"start-up", "training", "save"}
    assert all(moment.delay <= (10 if moment.phase == "start-up" else 2) for moment in moments)
    assert moments == [Moment.drawn(Random(seed), pace) for seed in range(50)]


@pytest.fixture
def drill(tmp_path: Path) -> Callable[..., str]:
    """Runs a drill on a tiny recipe; gives its output."""
    facts = write_byte_tokenizer(tmp_path)
    random = np.random.default_rng(0)
    for name in ("tokens", "held_out"):
        with TokenFileWriter(tmp_path / name, facts) as writer:
            writer.add(random.integers(1, 200, 9000).astype(np.int32))
    recipe = tiny_recipe(
        *("tokenizer.kind=bpe", f"tokenizer.path={tmp_path}/bpe.tiktoken", "model.vocab_size=352"),
        *("model.num_layers=2", "parallel.pipeline=2"),
        f"data.sources=[{{name='a', path='{tmp_path}/tokens'}}]",
        f"data.held_out=[{{name='a', path='{tmp_path}/held_out'}}]",
    )
    (tmp_path / "recipe.toml").write_text(dump_toml(recipe))

    def run(command: str, *options: str) -> str:
        words = [sys.executable, "-m", "phi4", "verify", command, "recipe.toml", *options]
        result = subprocess.run(
            [*words, "--work-dir", str(tmp_path / command)],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=LONG_SECONDS,
            check=False,
        )
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout

    return run


@pytest.mark.slow
def test_preempted_run_saves_and_goes_on(drill: Callable[..., str]) -> None:
    # This seed sends SIGTERM to a rank while it saves.
    output = drill("preempt", "--signals=1", "--seed=0")
    assert "1 notices: 1 with one save each" in output.splitlines()[-1]


@pytest.mark.slow
def test_killed_ranks_cost_no_step(drill: Callable[..., str]) -> None:
    output = drill("kills", "--kills=3", "--layouts=pp2")
    assert output.count("SIGKILL to rank") == 6, "a line and a row of the table each"
    assert "run 1 finished, 0 differences" in output
