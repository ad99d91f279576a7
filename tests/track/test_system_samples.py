"""Samples of machines: their file over restarts and kills, and the points made of them."""

import itertools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import msgspec
import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from phi4.rundir.launched_by import LaunchedBy
from phi4.track.mlflow import system_sampler
from phi4.track.mlflow.system_sampler import SystemSampler, sampling_beside
from phi4.track.mlflow.system_samples import SystemTail
from tests.support.waiting import wait_until

ALWAYS = {
    "cpu_percent",
    "memory_used_bytes",
    "memory_total_bytes",
    "ranks_resident_bytes",
    "run_dir_free_bytes",
}
TRAFFIC = {"network_sent_bytes_per_second", "network_received_bytes_per_second"}


class NvmlError(Exception):
    pass


def without_driver() -> None:
    raise NvmlError("driver not loaded")


NO_GPU = SimpleNamespace(NVMLError=NvmlError, nvmlInit=without_driver)


def sampler(run_dir: Path, node: int = 0, nvml: object | None = None) -> SystemSampler:
    return SystemSampler(run_dir, node, os.getpid(), nvml or NO_GPU)


def file_of(run_dir: Path, node: int = 0) -> Path:
    return run_dir / f"system/node_{node}.jsonl"


def lines_of(run_dir: Path, node: int = 0) -> list[dict]:
    return [msgspec.json.decode(line) for line in file_of(run_dir, node).read_bytes().splitlines()]


def test_sample_holds_what_this_machine_tells(tmp_path):
    one = sampler(tmp_path)
    one.sample()
    one.sample()
    first, second = lines_of(tmp_path)
    assert first.keys() == {"sample", "unix_seconds", *ALWAYS}
    assert second.keys() == {*first, *TRAFFIC}
    assert (first["sample"], second["sample"]) == (1, 2)
    assert second["unix_seconds"] >= first["unix_seconds"]
    assert 0 < first["memory_used_bytes"] <= first["memory_total_bytes"]
    assert first["ranks_resident_bytes"] > 0
    assert first["run_dir_free_bytes"] > 0


def test_resident_memory_counts_the_ranks_and_nobody_else(tmp_path):
    program = "import sys; x = bytearray(int(sys.argv[1])); print(flush=True); sys.stdin.read()"
    sizes = (50_000_000, 50_000_000, 90_000_000)
    started = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(size)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        for size in sizes
    ]
    try:
        for process in started:
            process.stdout.readline()
        SystemSampler(tmp_path, 0, started[0].pid, NO_GPU).sample()
        expected = sum(psutil.Process(p.pid).memory_info().rss for p in started[:2])
        found = lines_of(tmp_path)[0]["ranks_resident_bytes"]
        assert abs(found - expected) < 5_000_000
    finally:
        for process in started:
            process.communicate()


def test_numbers_go_on_over_restarts_and_behind_a_line_that_was_cut_off(tmp_path):
    for _ in range(2):
        sampler(tmp_path).sample()
    with file_of(tmp_path).open("ab") as file:
        file.write(b'{"sample":3,"unix_sec')
    tail = SystemTail(tmp_path)
    assert [sample.sample for sample in tail.read()] == [1, 2]
    sampler(tmp_path).sample()
    assert [sample.sample for sample in tail.read()] == [3]
    assert [sample.sample for sample in SystemTail(tmp_path).read()] == [1, 2, 3]


def test_points_have_the_prefix_that_mlflow_shows_as_system_metrics(tmp_path):
    for node in (0, 11, 2):
        sampler(tmp_path, node).sample()
    (tmp_path / "system/node_x.jsonl").write_text("{}")
    samples = SystemTail(tmp_path).read()
    assert [sample.node for sample in samples] == [0, 2, 11]
    assert samples[2].metrics.keys() == {f"system/node_11/{key}" for key in ALWAYS}
    assert samples[2].unix_seconds == lines_of(tmp_path, 11)[0]["unix_seconds"]


def test_samples_that_were_sent_are_left_out(tmp_path):
    one = sampler(tmp_path)
    for _ in range(3):
        one.sample()
    assert [sample.sample for sample in SystemTail(tmp_path, {0: 2}).read()] == [3]


@given(st.lists(st.integers(0, 400), max_size=6))
@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_tail_gives_every_sample_once_wherever_the_reader_looks(tmp_path_factory, cuts):
    root = tmp_path_factory.mktemp("tail")
    whole = b"".join(
        msgspec.json.encode({"sample": n, "unix_seconds": float(n), "x": n}) + b"\n"
        for n in range(1, 9)
    )
    path, tail, found = file_of(root), SystemTail(root), []
    path.parent.mkdir()
    for end in (*sorted(cuts), len(whole)):
        path.write_bytes(whole[:end])
        found += [sample.sample for sample in tail.read()]
    assert found == list(range(1, 9))


def test_sampling_is_done_when_it_is_due(tmp_path, monkeypatch):
    now = itertools.count(1000.0, 3.0)
    # This module's clock alone: other threads of the process read the real one.
    clock = SimpleNamespace(monotonic=lambda: next(now), time=time.time)
    monkeypatch.setattr(system_sampler, "time", clock)
    one = sampler(tmp_path)
    monkeypatch.setattr(one, "_traffic", dict)
    for _ in range(8):
        one.sample_if_due()
    # At 0, 12: the first call after 10 seconds.
    assert len(lines_of(tmp_path)) == 2


def test_nothing_that_fails_reaches_the_caller(tmp_path, monkeypatch):
    (tmp_path / "system").write_text("a file where the directory should be")
    sampler(tmp_path).sample()
    assert SystemTail(tmp_path).read() == []
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    monkeypatch.setattr(psutil, "net_io_counters", lambda: None)
    root = tmp_path / "run"
    SystemSampler(root, 0, gone.pid, NO_GPU).sample()
    (line,) = lines_of(root)
    assert line.keys() >= {"cpu_percent"} and "ranks_resident_bytes" not in line


def power_of(gpu: int) -> int:
    if gpu:
        raise NvmlError("not supported")
    return 650_500


TWO_GPUS = SimpleNamespace(
    NVMLError=NvmlError,
    NVML_TEMPERATURE_GPU=0,
    nvmlInit=lambda: None,
    nvmlDeviceGetCount=lambda: 2,
    nvmlDeviceGetHandleByIndex=lambda index: index,
    nvmlDeviceGetUtilizationRates=lambda gpu: SimpleNamespace(gpu=97, memory=40),
    nvmlDeviceGetMemoryInfo=lambda gpu: SimpleNamespace(total=80, used=70, free=10),
    nvmlDeviceGetPowerUsage=power_of,
    nvmlDeviceGetTemperature=lambda gpu, sensor: {0: 61}[sensor],
)
"""NVML as its documentation has it; the second GPU does not tell its power."""


def test_gpus_are_read_by_nvml(tmp_path):
    sampler(tmp_path, nvml=TWO_GPUS).sample()
    (line,) = lines_of(tmp_path)
    assert {key: value for key, value in line.items() if key.startswith("gpu_")} == {
        "gpu_0_utilization_percent": 97,
        "gpu_0_memory_used_bytes": 70,
        "gpu_0_power_watts": 650.5,
        "gpu_0_temperature_celsius": 61,
        "gpu_1_utilization_percent": 97,
        "gpu_1_memory_used_bytes": 70,
        "gpu_1_temperature_celsius": 61,
    }


@pytest.mark.parametrize(
    ("node", "local_rank", "wanted"), [(0, 0, True), (1, 1, True), (1, 0, False)]
)
def test_other_ranks_start_no_process(tmp_path, monkeypatch, node, local_rank, wanted):
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("started"))
    launched_by = LaunchedBy({}, node, local_rank)
    with sampling_beside(tmp_path, launched_by, wanted=wanted):
        pass


def children() -> set[psutil.Process]:
    return set(psutil.Process().children())


def ignored_by(pid: int) -> set[signal.Signals]:
    status = Path(f"/proc/{pid}/status").read_text()
    mask = int(status.partition("SigIgn:")[2].split()[0], 16)
    return {number for number in signal.valid_signals() if mask >> (number - 1) & 1}


def test_other_node_is_sampled_by_a_process_that_ends_with_the_block(tmp_path):
    before = children()
    with sampling_beside(tmp_path, LaunchedBy({}, 3, 0), wanted=True):
        wait_until(lambda: SystemTail(tmp_path).read(), "the first sample")
        (process,) = children() - before
        # A job's notices reach all of its processes.
        assert {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1} <= ignored_by(process.pid)
        assert process.nice() == 10
    assert children() == before
    (line,) = lines_of(tmp_path, 3)
    assert line["ranks_resident_bytes"] > 10_000_000


def test_process_ends_with_a_rank_that_is_killed(tmp_path):
    program = f"""
import time
from pathlib import Path
from phi4.rundir.launched_by import LaunchedBy
from phi4.track.mlflow.system_sampler import sampling_beside
with sampling_beside(Path({str(tmp_path)!r}), LaunchedBy({{}}, 1, 0), wanted=True):
    time.sleep({10**6})
"""
    rank = subprocess.Popen([sys.executable, "-c", program])
    (sampling,) = wait_until(lambda: psutil.Process(rank.pid).children(), "the process")
    wait_until(lambda: SystemTail(tmp_path).read(), "the first sample")
    rank.kill()
    rank.wait()
    wait_until(lambda: not sampling.is_running(), "the end of the process")
