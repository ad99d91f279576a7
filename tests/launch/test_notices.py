"""SIGTERM and SIGUSR1 to a run that takes notices: to whom, when, and how often."""

import os
import signal
import subprocess
import sys
import time
from unittest.mock import Mock, patch

import pytest

from phi4.cli import main
from phi4.errors import REQUEUE_EXIT_CODE
from phi4.launch.notices import SECOND_SECONDS, PassedOnNotice, save_and_end
from tests.launch.conftest import Launch
from tests.support.waiting import LONG_SECONDS, wait_until

ENDLESS_SECONDS = 10 * LONG_SECONDS

# Ranks that agree through files, as those of a run do through a reduction.
AGREEING = """
    with report_errors(takes_notices=True):
        noticed = take_notices(None)
        note(f"started_{rank}")
        while not (here / "asked").exists():
            if noticed.is_set():
                note("asked")
            time.sleep(0.01)
        sys.exit(5)
"""

DEAF = """
    with report_errors(takes_notices=True):
        take_notices(None)
        note(f"started_{rank}")
        time.sleep(100_000)
"""


def started(run: Launch, num_workers: int = 2) -> list[int]:
    return [run.pid_in(f"started_{rank}") for rank in range(num_workers)]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.parametrize("receivers", ["launcher", "rank 1", "all"])
def test_all_ranks_end_with_the_requeue_code(launch, number: int, receivers: str) -> None:
    run = launch(AGREEING, num_workers=2, stop=ENDLESS_SECONDS)
    first, second = started(run)
    told = {"launcher": [run.process.pid], "rank 1": [second]}
    for pid in told.get(receivers, [first, second, *run.survivors(), run.process.pid]):
        os.kill(pid, number)
    _, stderr = run.output()
    assert run.process.returncode == REQUEUE_EXIT_CODE, stderr
    if receivers != "all":
        assert ("saves its step" in stderr) == (receivers == "launcher")
    assert not run.survivors() and not run.leftovers()


def test_notice_to_a_rank_that_has_not_taken_it_yet_waits(launch) -> None:
    run = launch(
        """
    note(f"started_{rank}")
    await_note("go")
    """
        + AGREEING.replace("started", "takes_notices"),
        num_workers=2,
        stop=ENDLESS_SECONDS,
    )
    started(run)
    run.process.send_signal(signal.SIGTERM)
    # The launcher passed it on before it printed this.
    assert "saves its step" in run.process.stderr.readline()
    (run.directory / "go").touch()
    run.output()
    assert run.process.returncode == REQUEUE_EXIT_CODE


def test_process_that_a_rank_started_neither_dies_of_a_notice_nor_acts_on_it(launch) -> None:
    run = launch(
        """
        import multiprocessing, subprocess
        with report_errors(takes_notices=True):
            noticed = take_notices(None)
            fork = multiprocessing.get_context("fork")
            wait = "import sys; sys.stdin.read(); open(sys.argv[1], 'w').write('here')"
            spawned = subprocess.Popen(
                [sys.executable, "-c", wait, str(here / "spawned")], stdin=subprocess.PIPE
            )
            forked = fork.Process(target=lambda: (await_note("go"), note("forked")))
            forked.start()
            note("started_0")
            noticed.wait()
            note("go")
            spawned.communicate(b"")
            forked.join()
            sys.exit(5)
        """,
        num_workers=1,
        stop=ENDLESS_SECONDS,
    )
    run.pid_in("started_0")
    for pid in run.survivors():
        os.kill(pid, signal.SIGUSR1)
    run.output()
    assert run.process.returncode == REQUEUE_EXIT_CODE
    assert run.pid_in("forked") and (run.directory / "spawned").read_text() == "here"


def test_run_that_does_not_end_in_time_is_killed(launch) -> None:
    run = launch(DEAF, num_workers=2, grace=0.1, stop=0.5)
    started(run)
    run.process.send_signal(signal.SIGTERM)
    _, stderr = run.output()
    assert run.process.returncode == 128 + signal.SIGTERM
    assert stderr.endswith("interrupted by SIGTERM; all 2 workers are stopped\n")
    assert not run.survivors()


def test_second_sigterm_ends_at_once_and_usr1_before_it_does_not_count(launch) -> None:
    run = launch(DEAF, num_workers=2, grace=0.1, stop=ENDLESS_SECONDS)
    started(run)
    run.process.send_signal(signal.SIGUSR1)
    run.process.send_signal(signal.SIGTERM)
    run.process.send_signal(signal.SIGTERM)
    assert "saves its step" in run.process.stderr.readline()
    assert run.process.poll() is None

    def ended() -> bool:
        if run.process.poll() is None:
            run.process.send_signal(signal.SIGTERM)
        return run.process.poll() is not None

    wait_until(ended, "the end of the run")
    assert run.output()[1].startswith("interrupted by SIGTERM")
    # The last of them may have come when the launcher handled no signals any more.
    assert run.process.returncode in (128 + signal.SIGTERM, -signal.SIGTERM)


def test_interrupt_still_ends_at_once(launch) -> None:
    run = launch(DEAF, num_workers=2, stop=ENDLESS_SECONDS)
    started(run)
    run.process.send_signal(signal.SIGINT)
    run.output()
    assert run.process.returncode == 128 + signal.SIGINT


def test_interrupt_is_a_notice_where_the_plan_says_so(launch) -> None:
    script = AGREEING.replace("sys.exit(5)", "sys.exit(0)")
    run = launch(script, num_workers=2, mode="ctrl_c", stop=ENDLESS_SECONDS)
    started(run)
    run.process.send_signal(signal.SIGINT)
    _, stderr = run.output()
    assert run.process.returncode == 0 and stderr.startswith("SIGINT: ")
    assert not run.survivors()


def test_second_interrupt_ends_at_once(launch) -> None:
    run = launch(DEAF, num_workers=2, grace=0.1, mode="ctrl_c", stop=ENDLESS_SECONDS)
    started(run)
    run.process.send_signal(signal.SIGINT)
    assert run.process.stderr.readline().startswith("SIGINT: ")
    run.process.send_signal(signal.SIGINT)
    _, stderr = run.output()
    assert run.process.returncode == 128 + signal.SIGINT
    assert stderr == "interrupted by SIGINT; all 2 workers are stopped\n"
    assert not run.survivors()


def test_peer_that_fails_ends_the_others_without_a_notice(launch) -> None:
    run = launch(
        """
        with report_errors(takes_notices=True):
            noticed = take_notices(None)
            if rank == 1:
                await_note("started_0")
                raise DiskFullError("full")
            note("started_0")
            try:
                time.sleep(100_000)
            finally:
                note(f"noticed_{noticed.is_set()}")
        """,
        num_workers=2,
        grace=ENDLESS_SECONDS,
        stop=ENDLESS_SECONDS,
    )
    _, stderr = run.output()
    assert (run.process.returncode, stderr) == (4, "DiskFullError: full\n")
    assert run.pid_in("noticed_False")


def test_rank_that_fails_during_a_stop_gives_its_code(launch) -> None:
    run = launch(
        AGREEING.replace(
            "sys.exit(5)", "sys.exit(5) if rank else (_ for _ in ()).throw(DiskFullError('full'))"
        ),
        num_workers=2,
        stop=ENDLESS_SECONDS,
    )
    started(run)
    run.process.send_signal(signal.SIGTERM)
    _, stderr = run.output()
    assert run.process.returncode == 4 and stderr.endswith("DiskFullError: full\n")


ALONE = """
import sys, time
from phi4.launch import StopPlan, save_and_end, take_notices
noticed = take_notices(save_and_end({stop_seconds}), ends_at_second=True)
print("ready", flush=True)
noticed.wait()
print("noticed", flush=True)
time.sleep(100_000 if {hangs} else 0)
sys.exit(5)
"""


@pytest.mark.parametrize(
    ("stop_seconds", "hangs", "code", "said"),
    [
        (ENDLESS_SECONDS, False, 5, ""),
        (0.2, True, 143, "SIGTERM: not ended within reliability.stop_seconds=0.2; killed\n"),
        (ENDLESS_SECONDS, True, 143, "a second SIGTERM: ended without a save\n"),
    ],
)
def test_process_without_a_launcher(stop_seconds, hangs, code, said) -> None:
    script = ALONE.format(stop_seconds=stop_seconds, hangs=hangs)
    command = [sys.executable, "-c", script]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, **pipes)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == "noticed\n"
    while hangs and process.poll() is None:
        process.send_signal(signal.SIGTERM)
        time.sleep(0.1)
    _, stderr = process.communicate(timeout=LONG_SECONDS)
    assert (process.returncode, stderr) == (code, said)


def test_interrupt_of_a_process_without_a_launcher_is_a_notice() -> None:
    plan = f"StopPlan({ENDLESS_SECONDS}, '', '', 'gone', by_ctrl_c=True)"
    script = ALONE.format(stop_seconds=0, hangs=True).replace("save_and_end(0)", plan)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, "-c", script], **pipes)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "noticed\n"
    while process.poll() is None:
        process.send_signal(signal.SIGINT)
        time.sleep(0.1)
    _, stderr = process.communicate(timeout=LONG_SECONDS)
    assert (process.returncode, stderr) == (143, "a second SIGTERM: gone\n")


def test_only_a_sigterm_well_after_the_first_is_a_second_one(monkeypatch) -> None:
    now = iter([0.0, 100.0, 100.0 + SECOND_SECONDS, 101.1 + SECOND_SECONDS, 200.0])
    monkeypatch.setattr("phi4.launch.notices.time", Mock(monotonic=lambda: next(now)))
    notice = PassedOnNotice(save_and_end(10))
    numbers = (signal.SIGUSR1, signal.SIGTERM, signal.SIGTERM, signal.SIGTERM, signal.SIGUSR1)
    assert [notice.arrived(number) for number in numbers] == [False, False, False, True, False]


@pytest.mark.parametrize(
    ("words", "holds"),
    [
        ("train", True),
        ("launch local", True),
        ("serve", True),
        ("launch slurm", False),
        ("generate", False),
    ],
)
def test_commands_that_take_notices_keep_them_from_their_first_moment(
    words: str, holds: bool
) -> None:
    with patch("phi4.cli.hold_notices") as hold, pytest.raises(SystemExit, match="0"):
        main([*words.split(), "--help"])
    assert hold.called == holds
