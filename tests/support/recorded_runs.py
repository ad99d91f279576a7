"""Run directories as phi4 writes them, without training: for whoever reads them."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from phi4.config import Recipe, dump_toml, with_overrides
from phi4.rundir.attempts import Attempt, attempt_path, replace_attempt, utc_text
from phi4.rundir.names import (
    ABOUT_DIR,
    CONFIG_FILE,
    METRICS_FILE,
    ROLL_BACK_FILE,
    SAVES_FILE,
    SYSTEM_DIR,
    UNDONE_FILE,
)
from phi4.rundir.process import Process
from phi4.rundir.save_log import SaveEvent
from phi4.rundir.state import Change, RunState, Skip

BEGAN_UNIX = 1_790_000_000.0
STEP_TOKENS = 4_096


@dataclass
class RecordedRun:
    """A run that is made up, line by line, by a clock of its own.

    Attributes:
        run_dir: created.
        recipe: overrides of the default one.
        seed: of the noise.
        level: added to every loss.
    """

    run_dir: Path
    recipe: tuple[str, ...] = ()
    seed: int = 0
    level: float = 0.0
    clock: float = BEGAN_UNIX
    attempt: int = 0
    lines: list[dict[str, Any]] = field(default_factory=list)
    undone: list[dict[str, Any]] = field(default_factory=list)
    attempts: dict[int, Attempt] = field(default_factory=dict)
    saves: list[SaveEvent] = field(default_factory=list)
    skips: tuple[Skip, ...] = ()

    def __post_init__(self) -> None:
        self.random = np.random.default_rng(self.seed)
        self._pending: dict[str, float] = {}

    def start(self, wait: float = 0.0, loading: float = 20.0, host: str = "node-1") -> None:
        """Another attempt begins, so long after the last one's end."""
        self.clock += wait
        self.attempt += 1
        process = Process(host, "", 100 + self.attempt, 1)
        started = utc_text(self.clock)
        self.attempts[self.attempt] = Attempt(
            process, "", started, has_begun=True, started_unix=self.clock
        )
        self._pass(start=loading / 2, load=loading / 2)

    def step(self, seconds: float = 2.0, **numbers: float) -> None:
        """A step; `numbers` replace or join its own, with `__` for a slash."""
        step = self.lines[-1]["step"] + 1 if self.lines else 1
        self._pass(data=0.05 * seconds, step=0.95 * seconds)
        loss = 2.0 + 6.0 / math.sqrt(1 + step / 10) + self.level + self.random.normal(0, 0.05)
        line = {
            "step": step,
            "loss": loss,
            "grad_norm": float(math.exp(self.random.normal(-0.7, 0.2))),
            "learning_rate": 3e-4 * min(1.0, step / 20),
            "consumed_tokens": step * STEP_TOKENS,
            "step_seconds": seconds,
            "tokens_per_second": STEP_TOKENS / seconds,
            "unix_seconds": self.clock,
            "attempt": self.attempt,
            **{f"seconds/{name}": value for name, value in self._pending.items()},
            **{key.replace("__", "/"): value for key, value in numbers.items()},
        }
        self._pending = {}
        self.lines.append(line)

    def steps(self, count: int, seconds: float = 2.0, **numbers: float) -> None:
        """Some steps alike."""
        for _ in range(count):
            self.step(seconds, **numbers)

    def save(self, seconds: float = 5.0) -> None:
        """A save of the last step."""
        self._pass(save=seconds)
        step = self.lines[-1]["step"]
        event = SaveEvent(
            step=step,
            state="durable",
            attempt=self.attempt,
            unix_seconds=self.clock,
            seconds=seconds,
            stall_seconds=seconds / 4,
            manifest_sha256=f"{step:064x}"[::-1],
        )
        self.saves.append(event)

    def roll_back(self, step: int, reason: str, seconds: float = 3.0) -> dict[str, float]:
        """Go back to a step; the numbers that the next step says of it."""
        last = self.lines[-1]["step"]
        self._cut(step, "roll_back")
        self._pass(roll_back=seconds)
        rows = (last - step) * 8
        skip = Skip(after_step=step, last_undone=last, units=rows, rows=rows, reason=reason)
        self.skips = (*self.skips, skip)
        return {
            "rolled_back_from": last,
            "skipped_rows": rows,
            "roll_backs": len(self.skips),
        }

    def kill(self, saved_step: int, unnoted: float = 1.5) -> None:
        """End without a word; the next attempt goes on from the saved step."""
        self.clock += unnoted
        self._pending = {}
        ended = f"taken over by attempt {self.attempt + 1}"
        self._note(ended=ended)
        self._cut(saved_step, "resume")

    def end(self, outcome: str = "finished", **fields: Any) -> None:
        """End as what it is."""
        self._pass(other=1.0)
        self._note(
            outcome=outcome,
            ended="released",
            ended_unix=self.clock,
            seconds=self._pending,
            **fields,
        )
        self._pending = {}

    def write(self) -> Path:
        """Write the directory; returns it."""
        self.run_dir.mkdir(parents=True)
        recipe = with_overrides(Recipe(), [f"run.dir={self.run_dir}", *self.recipe])
        (self.run_dir / CONFIG_FILE).write_text(dump_toml(recipe), encoding="utf-8")
        _write_lines(self.run_dir / METRICS_FILE, map(_plain, self.lines))
        if self.undone:
            _write_lines(self.run_dir / UNDONE_FILE, map(_plain, self.undone))
        for number, attempt in self.attempts.items():
            path = attempt_path(self.run_dir, number)
            path.parent.mkdir(exist_ok=True)
            replace_attempt(path, attempt)
        if self.saves:
            _write_lines(self.run_dir / SAVES_FILE, self.saves)
        if self.skips:
            state = RunState(
                step=self.skips[-1].after_step, skips=self.skips, roll_backs=len(self.skips)
            )
            (self.run_dir / ROLL_BACK_FILE).write_text(state.to_json(), encoding="utf-8")
        return self.run_dir

    def _pass(self, **seconds: float) -> None:
        for name, value in seconds.items():
            self.clock += value
            self._pending[name] = self._pending.get(name, 0.0) + value

    def _note(self, **fields: Any) -> None:
        self.attempts[self.attempt] = msgspec.structs.replace(self.attempts[self.attempt], **fields)

    def _cut(self, step: int, by: str) -> None:
        self.undone += [line | {"undone_by": by} for line in self.lines if line["step"] > step]
        self.lines = [line for line in self.lines if line["step"] <= step]


def eventful_run(run_dir: Path, *, recipe: tuple[str, ...] = (), seed: int = 0) -> RecordedRun:
    """A kill with a resume, a spike with a roll back, and a preemption before it finished."""
    run = RecordedRun(run_dir, ("run.steps=120", "optim.learning_rate=3e-4", *recipe), seed=seed)
    run.start()
    run.steps(30, **_details(0.5))
    run.save()
    run.steps(8, **_details(0.5))
    run.kill(saved_step=30)
    run.start(wait=60, loading=30)
    run.steps(30, **_details(0.45))
    run.save()
    run.steps(6, **_details(0.45))
    run.step(loss=9.0, grad_norm=800.0, skipped=1.0, bad_in_row=1.0)
    run.step(loss=math.nan, grad_norm=math.inf, skipped=1.0, bad_in_row=2.0)
    numbers = run.roll_back(60, "2 bad steps in a row, the last one: gradient norm is inf")
    run.step(**numbers)
    run.steps(19, 1.8, **_details(0.4))
    run.step(1.8, held_out_loss=4.0, held_out_loss__web=4.1, held_out_loss__code=3.9)
    run.save()
    run.end("interrupted", reason="SIGTERM", preempted=True)
    run.start(wait=200, loading=30, host="node-2")
    run.steps(38, 1.6, **_details(0.4))
    run.step(1.6, held_out_loss=3.4, held_out_loss__web=3.5, held_out_loss__code=3.3)
    run.save()
    run.end()
    return run


def write_about(run_dir: Path, number: int, about: Mapping[str, Any]) -> None:
    """What an attempt noted about itself."""
    path = run_dir / ABOUT_DIR / attempt_path(Path(), number).name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(msgspec.json.encode(about))


def write_samples(run_dir: Path, node: str, samples: Iterable[Mapping[str, Any]]) -> None:
    """Samples of a node's system."""
    path = run_dir / SYSTEM_DIR / f"{node}.jsonl"
    path.parent.mkdir(exist_ok=True)
    _write_lines(path, samples)


def write_state(run_dir: Path, *changes: Change, **fields: Any) -> None:
    """A state that knows of changes, as the newest roll back leaves it."""
    state = RunState(history=changes, roll_backs=1, **fields)
    (run_dir / ROLL_BACK_FILE).write_text(state.to_json(), encoding="utf-8")


def _details(web: float) -> dict[str, float]:
    return {
        "data__web": web,
        "data__code": 1 - web,
        "grad_norm__attention": 0.3,
        "grad_norm__mlp": 0.5,
        "memory__weights": 2.0**31,
        "memory__peak": 2.0**33,
        "mfu_causal": 0.41,
        "mfu_full": 0.45,
    }


def _plain(line: Mapping[str, Any]) -> dict[str, Any]:
    """With the strings that metrics.jsonl has for what JSON has not."""
    words = {math.inf: "Infinity", -math.inf: "-Infinity"}
    return {
        key: "NaN" if value != value else words.get(value, value) for key, value in line.items()
    }


def _write_lines(path: Path, entries: Iterable[Any]) -> None:
    path.write_bytes(b"".join(msgspec.json.encode(entry) + b"\n" for entry in entries))
