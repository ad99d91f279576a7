"""What following a run in MLflow costs its training, on this machine.

Stretches of steps with the trackers and without them, in turns, in one process. Without them the
process that fills MLflow is stopped too, so that it does not send what it has while nothing is
logged.
"""

import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from phi4.config import Recipe, dump_toml, with_overrides
from phi4.engine.engine import Engine
from phi4.engine.platform import connect, disconnect
from phi4.rundir.lease import take_lease
from phi4.rundir.names import CONFIG_FILE
from phi4.stages.pretrain import NextToken
from phi4.track import Trackers, open_trackers
from tools.step_time import host_batches, ratio_interval

LARGEST_SHARE = 0.005
"""Of a step's time, by the thread's clock."""
LARGEST_RATIO = 1.02
"""Upper end of the 95% interval of the stretches' ratio."""

_STRETCH_STEPS = 5
"""Half a second: shorter than most changes of the machine's speed, so they cancel in a pair."""

# The model of examples/recipes/tiny_pretrain.toml on one process, and half of its batch.
_RECIPE = """
model.num_layers=8 model.hidden_size=64 model.num_attention_heads=8 model.num_key_value_heads=2
model.intermediate_size=224 model.vocab_size=2048 model.max_position_embeddings=256
model.init_std=0.05 data.sequence_length=128 data.unit_tokens=128 batch.global_batch_size=8
batch.micro_batch_size=4 optim.learning_rate=1e-4 precision.dtype=fp32 run.steps=100000
"""
_NUM_KEYS = 40
"""Numbers of a step, about as many as the meter's."""


class TrackedLoop:
    """Steps of a model, with the trackers or without.

    Attributes:
        tracker_seconds: by the training thread's clock, of each tracked step.
    """

    def __init__(self, recipe: Recipe, trackers: Trackers) -> None:
        self._recipe, self._trackers = recipe, trackers
        self._engine = Engine(recipe, connect("cpu", threads=1))
        self._step = 0
        self._follower = self._started_follower()
        self.tracker_seconds: list[float] = []

    def stretch(self, *, is_tracked: bool) -> tuple[float, float]:
        """Median seconds of a step by the wall clock, and by the thread's."""
        self._follower.send_signal(signal.SIGCONT if is_tracked else signal.SIGSTOP)
        times = []
        for _ in range(_STRETCH_STEPS):
            start = time.perf_counter(), time.thread_time()
            batches = host_batches(self._recipe, 1, self._step)
            rate = self._recipe.optim.learning_rate
            loss = self._engine.train_step(batches, NextToken(), learning_rate=rate).loss
            if is_tracked:
                self._log(loss)
            times.append(np.subtract((time.perf_counter(), time.thread_time()), start))
        return tuple(np.median(times, axis=0).tolist())

    def close(self) -> None:
        """End the engine; the trackers are the caller's."""
        self._follower.send_signal(signal.SIGCONT)
        self._engine.close()
        disconnect()

    def _log(self, loss: float) -> None:
        self._step += 1
        numbers = {f"numbers/{index}": loss + index for index in range(_NUM_KEYS)}
        line = {"loss": loss, **numbers, "unix_seconds": time.time(), "attempt": 1}
        before = time.thread_time()
        self._trackers.log(self._step, line)
        self.tracker_seconds.append(time.thread_time() - before)

    def _started_follower(self) -> psutil.Process:
        [follower] = [
            child
            for child in psutil.Process().children()
            if "phi4.track.mlflow.process" in child.cmdline()
        ]
        return follower


def measure(uri: str, run_dir: Path, pairs: int) -> dict[str, Any]:
    """Stretches in turns, every other pair in the other order.

    Args:
        uri: uri of a tracking server.
        run_dir: made here.
        pairs: number of pairs.
    """
    words = (*_RECIPE.split(), f"run.dir={run_dir}", f"tracking.uri={uri}")
    recipe = with_overrides(Recipe(), words)
    lease = take_lease(run_dir, job="", say=print)
    lease.begin()
    (run_dir / CONFIG_FILE).write_text(dump_toml(recipe))
    trackers = open_trackers(recipe, resume_step=0, is_writer=True, say=lambda text: None)
    before = time.thread_time(), time.perf_counter()
    trackers.start({}, [])
    start_ms = np.subtract((time.thread_time(), time.perf_counter()), before) * 1e3
    loop = TrackedLoop(recipe, trackers)
    loop.stretch(is_tracked=True)
    time.sleep(10.0)
    loop.tracker_seconds.clear()
    times = np.empty((pairs, 2, 2))
    for index in range(pairs):
        for side in (1, 0) if index % 2 else (0, 1):
            times[index, side] = loop.stretch(is_tracked=side == 0)
    loop.close()
    # A server that is slow or away is not waited for.
    trackers.finish("interrupted")
    lease.release()
    share = float(np.median(loop.tracker_seconds)) / float(np.median(times[:, 1, 1]))
    ratio, *interval = ratio_interval(*times[..., 0].T)
    thread_ratio, *thread_interval = ratio_interval(*times[..., 1].T)
    return {
        "tracker_share": round(share, 6),
        "tracker_ms": round(float(np.median(loop.tracker_seconds)) * 1e3, 4),
        "start_ms": [round(ms, 2) for ms in start_ms.tolist()],
        "step_ms": round(float(np.median(times[:, 1, 0])) * 1e3, 2),
        "ratio": ratio,
        "ratio_95": interval,
        "thread_ratio": thread_ratio,
        "thread_ratio_95": thread_interval,
        "pairs": pairs,
        "keys": _NUM_KEYS,
    }
