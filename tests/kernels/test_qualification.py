"""Self-qualification on simulated machines: what is proven and timed, kept, and then chosen."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from phi4_kernels import cuda_library, dispatch, evidence, registry
from phi4_kernels.evidence import GpuMachine
from phi4_kernels.qualification import Qualification, gpu, is_needed, qualify
from phi4_kernels.qualification.cache import held

GPU = torch.device("cuda", 0)
H200 = GpuMachine("H200", "9.0", "3.6.0")
OPS = ("rope", "swiglu")
GREEN = {"num_checks": 2, "worst_margin": 0.5, "red": {}}
RED = {"num_checks": 2, "worst_margin": 0.5, "red": {"rope_qkv/partial/bf16": "GateError: out0"}}


class Simulated:
    """A machine on which kernels have the results and times that a test gives.

    Args:
        results: by op; green where it says nothing, out of time where it says None.
        us: microseconds by op and implementation; 1 of a kernel and 2 of torch without.
    """

    def __init__(
        self,
        results: dict[str, dict[str, Any] | None] | None = None,
        us: dict[str, dict[str, float | None]] | None = None,
        machine: GpuMachine = H200,
    ) -> None:
        self.machine, self._results, self._us = machine, results or {}, us or {}
        self.proved: list[tuple[str, str]] = []
        self.timed: list[tuple[str, list[str]]] = []

    def columns(self) -> dict[str, Any]:
        m = self.machine
        versions = {"device": m.device, "capability": m.capability, "triton": m.triton}
        return versions | {"commit": "here", "date": "2026-12-01"}

    def prove(
        self, candidates: Sequence[tuple[str, str]], seconds: float
    ) -> Iterator[tuple[tuple[str, str], dict[str, Any] | None]]:
        for candidate in candidates:
            self.proved.append(candidate)
            yield candidate, self._results.get(candidate[0], GREEN)

    def time(self, op: str, names: Sequence[str]) -> dict[str, float | None]:
        self.timed.append((op, list(names)))
        return {n: self._us.get(op, {}).get(n, 2.0 if n == "torch" else 1.0) for n in names}


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A user without rows, on a pretended H200; gives the user's cache."""
    monkeypatch.setattr(dispatch, "CORRECTNESS_ROWS", tmp_path / "correctness.jsonl")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "H200")
    monkeypatch.setattr(evidence, "triton_version", lambda: "3.6.0")
    dispatch.choose.cache_clear()
    yield tmp_path / "cache/phi4/kernels.jsonl"
    dispatch.choose.cache_clear()


def _chosen(op: str = "rope") -> str:
    dispatch.choose.cache_clear()
    return dispatch.choose(op, "auto", GPU).describe()


def _verdicts(done: Qualification) -> dict[str, str]:
    return {found.op: found.verdict for found in done.findings}


def test_green_kernels_are_proven_timed_kept_and_chosen(fresh: Path) -> None:
    assert is_needed(H200, dispatch.known(), OPS)
    machine = Simulated()
    done = qualify(machine, ops=OPS)
    assert machine.proved == [("rope", "triton"), ("swiglu", "triton")]
    assert machine.timed == [(op, ["triton", "torch"]) for op in OPS]
    assert _verdicts(done) == dict.fromkeys(OPS, "proven") and done.problem is None
    assert done.findings[0].detail == (
        "2 checks, worst 0.50 of the rule; triton 1.0 us, torch 2.0 us"
    )
    expected = "rope: triton (auto: fastest that is proven on this H200: triton 1.0 us, torch 2.0"
    assert _chosen().startswith(expected)
    assert len(done.rows) == 4 == len(evidence.read_rows(fresh))
    # The next start has nothing to do.
    assert not is_needed(H200, dispatch.known(), OPS)
    again = Simulated()
    assert qualify(again, ops=OPS).rows == () and not again.proved and not again.timed


def test_torch_is_chosen_where_it_is_faster() -> None:
    qualify(Simulated(us={"rope": {"triton": 3.0}}), ops=OPS)
    assert _chosen() == (
        "rope: torch (auto: fastest that is proven on this H200: triton 3.0 us, torch 2.0 us)"
    )
    assert _chosen("swiglu").startswith("swiglu: triton")


def test_what_cannot_be_timed_is_chosen_all_the_same() -> None:
    qualify(Simulated(us={"rope": {"triton": None, "torch": None}}), ops=OPS)
    assert _chosen() == "rope: triton (auto: proven on this H200; none could be timed)"
    assert not is_needed(H200, dispatch.known(), OPS)


def test_a_red_kernel_is_named_and_torch_runs() -> None:
    machine = Simulated(results={"rope": RED})
    done = qualify(machine, ops=OPS)
    assert done.findings[0].describe() == (
        "rope triton: red: rope_qkv/partial/bf16: GateError: out0"
    )
    assert machine.timed == [("swiglu", ["triton", "torch"])]
    assert _chosen() == "rope: torch (auto: no kernel of this source is proven on 9.0; red: triton)"
    # A red row is an answer: it is not asked again at every start, but said.
    later = qualify(Simulated(), ops=OPS)
    assert later.findings[0].describe() == "rope triton: red: found on 2026-12-01"


def test_a_red_row_of_this_card_withdraws_a_committed_green_one(tmp_path: Path) -> None:
    row = {"op": "rope", "implementation": "triton", "green": True, "device": "H100"}
    row |= {"source": registry.source_digest("rope", "triton"), "capability": "9.0"}
    row |= {"triton": "3.6.0", "commit": "abc"}
    dispatch.CORRECTNESS_ROWS.write_text(json.dumps(row) + "\n")
    assert _chosen() == "rope: triton (auto: proven on 9.0, commit abc)"
    # It is another card's, so this one is asked too.
    assert is_needed(H200, dispatch.known(), ("rope",))
    qualify(Simulated(results={"rope": RED}), ops=("rope",))
    assert _chosen().startswith("rope: torch")


@pytest.mark.parametrize("change", ["source", "triton", "device"])
def test_rows_of_something_else_are_made_anew(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    qualify(Simulated(), ops=OPS)
    machine = H200
    if change == "source":
        digest = registry.source_digest
        changed = {("rope", "triton"): "0" * 16}
        monkeypatch.setattr(registry, "source_digest", lambda *of: changed.get(of) or digest(*of))
        assert _chosen().startswith("rope: torch") and _chosen("swiglu").startswith("swiglu: tri")
    elif change == "triton":
        machine = GpuMachine("H200", "9.0", "3.7.0")
        monkeypatch.setattr(evidence, "triton_version", lambda: "3.7.0")
        assert _chosen().startswith("rope: torch")
    else:
        machine = GpuMachine("H100", "9.0", "3.6.0")
    assert is_needed(machine, dispatch.known(), OPS)
    asked = Simulated(machine=machine)
    done = qualify(asked, ops=OPS)
    assert asked.proved == [("rope", "triton"), ("swiglu", "triton")][: 1 + (change != "source")]
    assert _verdicts(done) == dict.fromkeys(OPS, "proven")


def test_a_cache_that_cannot_be_written_counts_for_this_run_alone(fresh: Path) -> None:
    fresh.parent.parent.mkdir(parents=True)
    fresh.parent.write_text("a file where a directory should be")
    done = qualify(Simulated(), ops=OPS)
    assert "File exists" in done.problem or "Not a directory" in done.problem
    choice = dispatch.choose("rope", "auto", GPU, evidence=done.evidence)
    assert choice.implementation == "triton"
    assert _chosen().startswith("rope: torch")


def test_a_full_disk_is_said(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write

    def fails(descriptor: int, content: bytes) -> int:
        if b'"op"' in content:
            raise OSError(28, "No space left on device")
        return write(descriptor, content)

    monkeypatch.setattr(os, "write", fails)
    done = qualify(Simulated(), ops=OPS)
    assert done.problem == f"{fresh}: No space left on device"
    assert _verdicts(done) == dict.fromkeys(OPS, "proven")


def test_half_a_line_costs_that_row_alone(fresh: Path) -> None:
    qualify(Simulated(), ops=("rope",))
    whole = fresh.read_bytes().rstrip()
    fresh.write_bytes(whole[: len(whole) - 20])
    asked = Simulated()
    qualify(asked, ops=OPS)
    # The cut line was rope's times; its proof and what was appended behind it count.
    assert asked.proved == [("swiglu", "triton")]
    assert [op for op, _ in asked.timed] == ["rope", "swiglu"]
    assert not is_needed(H200, dispatch.known(), OPS)


def test_what_is_not_done_in_time_is_said_and_goes_on_next_time() -> None:
    done = qualify(Simulated(results={"swiglu": None}), ops=OPS)
    assert _verdicts(done) == {"rope": "proven", "swiglu": "not in time"}
    assert _chosen("swiglu").startswith("swiglu: torch")
    asked = Simulated()
    assert _verdicts(qualify(asked, ops=OPS)) == dict.fromkeys(OPS, "proven")
    assert asked.proved == [("swiglu", "triton")]


def test_nothing_is_timed_after_the_limit() -> None:
    ticks = iter(range(0, 1000, 50))
    machine = Simulated()
    done = qualify(machine, ops=OPS, clock=lambda: next(ticks), limit_seconds=60)
    assert machine.timed == [] and "not timed" in done.findings[0].detail


def test_again_makes_all_rows_anew() -> None:
    qualify(Simulated(results={"rope": RED}), ops=OPS)
    asked = Simulated()
    qualify(asked, ops=OPS, again=True)
    assert len(asked.proved) == len(asked.timed) == 2 and _chosen().startswith("rope: triton")


def test_a_cuda_op_that_is_not_built_is_absent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_library, "BUILDS", tmp_path)
    machine = Simulated()
    done = qualify(machine, ops=("adamw",))
    assert _verdicts(done) == {"adamw": "absent"} and "make csrc" in done.findings[0].detail
    assert not machine.proved and not is_needed(H200, dispatch.known(), ("adamw",))


def test_without_triton_its_kernels_are_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    find = registry.importlib.util.find_spec
    monkeypatch.setattr(
        registry.importlib.util, "find_spec", lambda name: None if name == "triton" else find(name)
    )
    machine = Simulated()
    done = qualify(machine, ops=OPS)
    assert _verdicts(done) == dict.fromkeys(OPS, "absent") and not machine.proved
    assert "triton is not installed" in done.findings[0].detail
    assert not is_needed(H200, dispatch.known(), OPS)


def _hold(path: Path, entered: Any, leave: Any) -> None:
    with held(path, wait_seconds=30):
        entered.set()
        leave.wait(30)


def test_two_ranks_at_once_take_turns(fresh: Path) -> None:
    forked = multiprocessing.get_context("fork")
    entered, leave = forked.Event(), forked.Event()
    other = forked.Process(target=_hold, args=(fresh, entered, leave))
    other.start()
    assert entered.wait(30)
    with held(fresh, wait_seconds=0) as cache:
        assert cache.problem == f"{fresh} is held by another run"
    other.kill()
    other.join()
    # The dead process holds it no more.
    with held(fresh, wait_seconds=30) as cache:
        assert cache.problem is None


def test_the_second_rank_reads_what_the_first_made(fresh: Path) -> None:
    forked = multiprocessing.get_context("fork")
    entered, leave = forked.Event(), forked.Event()
    other = forked.Process(target=_hold, args=(fresh, entered, leave))
    other.start()
    assert entered.wait(30)
    rows = qualify(Simulated(), ops=OPS, cache=fresh.with_name("first.jsonl")).rows
    fresh.write_text("".join(json.dumps(row) + "\n" for row in rows))
    leave.set()
    second = Simulated()
    done = qualify(second, ops=OPS)
    other.join()
    assert not second.proved and _verdicts(done) == dict.fromkeys(OPS, "proven")


def test_two_sizes_of_every_function() -> None:
    checks = gpu.two_sizes("swiglu", "triton")
    entries = [e for e in registry.entries().values() if e.op == "swiglu"]
    assert {check[0] for check in checks} == {entry.name for entry in entries}
    assert len(checks) == 2 * len(entries) and {check[2] for check in checks} == {"bf16"}
    assert ("swiglu", "w17920", "bf16") in checks
    assert all(not case.startswith("empty") for _, case, _ in checks)
    assert {check[2] for check in gpu.two_sizes("grad_norm", "torch")} == {"bf16"}


@pytest.fixture
def taking_no_signals() -> Iterator[None]:
    """A process that takes its signals in a thread, as a run does."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    yield
    signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _planted(implementation: str, device: str, check: tuple[str, str, str]) -> float | str:
    kind = implementation
    if kind == "hangs":
        time.sleep(60)
    if kind == "dies":
        os._exit(1)
    return "GateError: out0" if kind == "red" else 0.25


def _spoiled(device: str, implementation: str, check: tuple[str, str, str]) -> float | str:
    return _planted(implementation, device, check)


@pytest.mark.parametrize(
    ("kind", "result"),
    [
        ("green", {"num_checks": 2, "worst_margin": 0.25, "red": {}}),
        ("red", {"num_checks": 2, "worst_margin": 0.0, "red": dict.fromkeys("ab", "GateError: x")}),
        ("dies", None),
        ("hangs", None),
    ],
)
def test_the_prover_judges_processes(
    kind: str, result: dict | None, monkeypatch: pytest.MonkeyPatch, taking_no_signals: None
) -> None:
    # Forked here: what is planted in this process is then in theirs.
    forked = multiprocessing.get_context("fork")
    monkeypatch.setattr(gpu.multiprocessing, "get_context", lambda _: forked)
    monkeypatch.setattr(gpu, "two_sizes", lambda *_: [("rope_qkv", c, "bf16") for c in "ab"])
    monkeypatch.setattr(gpu, "_outcome", _spoiled)
    prover = gpu.GpuProver(GPU, jobs=2)
    ((candidate, found),) = prover.prove([("rope", kind)], 3.0)
    assert candidate == ("rope", kind)
    if result is None:
        assert found is None
    else:
        assert found["num_checks"] == 2 and found["worst_margin"] == result["worst_margin"]
        assert len(found["red"]) == len(result["red"])


def test_the_command_says_that_there_is_no_gpu() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "phi4_kernels.qualification", "--op", "rope"],
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and "nothing to qualify" in done.stdout, done.stderr
