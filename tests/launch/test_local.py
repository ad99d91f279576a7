"""The launcher with real processes: how a run starts, and every way in which it can end."""

import os
import pty
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from phi4.launch import ErrorReport, local
from tests.support.waiting import LONG_SECONDS, wait_until

# Far longer than any wait of these tests: a run that used it up would fail by LONG_SECONDS.
ENDLESS_SECONDS = 10 * LONG_SECONDS

WAIT_FOR_EVER = """
    note(f"started_{rank}")
    with report_errors():
        time.sleep(100_000)
"""

STUBBORN = """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    note(f"started_{rank}")
    time.sleep(100_000)
"""

GLOO = """
    import gc
    gc.disable()  # takes half of the imports' time
    import torch
    import torch.distributed as dist
    gc.freeze()

    def join(world_size):
        store = dist.FileStore(os.environ["PHI4_RENDEZVOUS"] + "/store", world_size)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
        dist.barrier()
"""


def test_workers_get_their_ranks_and_rank_0_the_output(launch):
    run = launch(
        """
        keys = ["RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "OMP_NUM_THREADS"]
        print(*(os.environ[key] for key in [*keys, "GLOO_SOCKET_IFNAME"]))
        print(f"stderr of {rank}", file=sys.stderr)
        assert Path(os.environ["PHI4_RENDEZVOUS"]).is_dir()
        """,
        num_workers=3,
    )
    stdout, stderr = run.output()
    assert (run.process.returncode, stdout, stderr) == (0, "0 0 3 3 1 lo\n", "stderr of 0\n")
    assert run.log(1) == "1 1 3 3 1 lo\nstderr of 1\n"
    assert run.log(2) == "2 2 3 3 1 lo\nstderr of 2\n"
    assert not run.survivors() and not run.leftovers()


def test_terminal_stays_a_terminal_for_rank_0(launch):
    ours, theirs = pty.openpty()
    run = launch("print('terminal', sys.stdout.isatty())", num_workers=2, stdout=theirs)
    os.close(theirs)
    assert run.process.wait(LONG_SECONDS) == 0
    assert os.read(ours, 100) == b"terminal True\r\n"
    os.close(ours)
    assert run.log(1) == "terminal False\n"


def test_raise_ends_the_others_and_is_the_last_word(launch):
    run = launch(
        """
        with report_errors():
            if rank == 1:
                await_note("started_0")
                await_note("started_2")
                raise RuntimeError("boom from rank 1")
            note(f"started_{rank}")
            time.sleep(100_000)
        """,
        num_workers=3,
    )
    _, stderr = run.output()
    assert run.process.returncode == 1
    assert stderr.startswith("rank 1 of 3 failed:\nTraceback (most recent call last):\n")
    assert stderr.endswith("\nRuntimeError: boom from rank 1\n")
    assert "worker.py" not in stderr, "the traceback starts at the caller"
    assert "RuntimeError: boom from rank 1" in run.log(1)
    assert not run.survivors() and not run.leftovers()


@pytest.mark.parametrize(
    ("error", "exit_code"),
    [
        ("LayoutError('parallel.tensor=4 does not divide 10; use 1, 2, 5 or 10')", 2),
        ("DiskFullError('run.dir=/full needs 7 bytes, 6 are free')", 4),
    ],
)
def test_user_error_is_one_line_and_its_exit_code(launch, error, exit_code):
    run = launch(
        f"""
        with report_errors():
            raise {error}
        """,
        num_workers=2,
    )
    _, stderr = run.output()
    assert run.process.returncode == exit_code
    assert stderr == error.replace("('", ": ").replace("')", "\n")


def test_raise_while_all_others_are_stuck_in_collectives_ends_the_run(launch):
    # Ranks 0 and 2 wait for each other in C++, where no Python signal handler runs.
    run = launch(
        GLOO
        + """
    with report_errors():
        join(3)
        if rank == 1:
            note("raising")
            raise RuntimeError("boom from rank 1")
        dist.recv(torch.zeros(1), src=2 - rank)
        """,
        num_workers=3,
    )
    run.pid_in("raising")
    _, stderr = run.output()
    assert run.process.returncode == 1
    assert stderr.endswith("\nRuntimeError: boom from rank 1\n")
    assert not run.survivors()


def test_killed_rank_is_named_and_not_the_peer_whose_connection_broke(launch):
    run = launch(
        GLOO
        + """
    with report_errors():
        join(2)
        print("last words", flush=True)
        note(f"started_{rank}")
        dist.all_reduce(torch.zeros(1)) if rank == 0 else time.sleep(100_000)
        """,
        num_workers=2,
    )
    run.pid_in("started_0")
    os.kill(run.pid_in("started_1"), signal.SIGKILL)
    _, stderr = run.output()
    assert run.process.returncode == 128 + signal.SIGKILL
    assert stderr.splitlines()[-2] == "last words"
    assert stderr.splitlines()[-1].startswith("rank 1 of 2 was killed by signal 9 (SIGKILL)")
    assert not run.survivors()


def test_kill_that_is_seen_late_is_still_the_cause(capsys):
    # On a busy machine the peer's report of the broken connection is older than that.
    report = ErrorReport(0, 1000.0, "RuntimeError", "Connection closed by peer", "", False, 1)
    ended = [SimpleNamespace(returncode=1), SimpleNamespace(returncode=-signal.SIGKILL)]
    workers = [
        local._Worker(rank, process, None, 0, died_at=1000.0 + 60 * rank)
        for rank, process in enumerate(ended)
    ]
    assert local._conclude(workers, [report], []) == 128 + signal.SIGKILL
    assert capsys.readouterr().err.startswith("rank 1 of 2 was killed by signal 9")


def test_crash_shows_where_and_gives_128_plus_the_signal(launch):
    run = launch(
        "os.kill(os.getpid(), signal.SIGSEGV) if rank == 1 else time.sleep(100_000)", num_workers=2
    )
    _, stderr = run.output()
    assert run.process.returncode == 128 + signal.SIGSEGV
    assert "Fatal Python error: Segmentation fault" in stderr
    assert "rank 1 of 2 was killed by signal 11 (SIGSEGV)" in stderr.splitlines()[-1]


@pytest.mark.parametrize(("number", "exit_code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signal_to_the_launcher_ends_the_run(launch, number, exit_code):
    # Workers that listen must not use up the grace.
    run = launch(WAIT_FOR_EVER, num_workers=2, grace=ENDLESS_SECONDS)
    run.pid_in("started_0"), run.pid_in("started_1")
    run.process.send_signal(number)
    _, stderr = run.output()
    assert run.process.returncode == exit_code
    assert stderr == f"interrupted by {signal.Signals(number).name}; all 2 workers are stopped\n"
    assert not run.survivors() and not run.leftovers()


def test_ctrl_c_lets_workers_finish_within_the_grace(launch):
    run = launch(
        """
        with report_errors():
            try:
                note(f"started_{rank}")
                time.sleep(100_000)
            except KeyboardInterrupt:
                time.sleep(0.5)
                note(f"finished_{rank}")
                raise
        """,
        num_workers=2,
        grace=ENDLESS_SECONDS,
    )
    run.pid_in("started_0"), run.pid_in("started_1")
    run.process.send_signal(signal.SIGINT)
    run.output()
    assert {path.name for path in run.directory.glob("finished_*")} == {"finished_0", "finished_1"}


def test_workers_that_ignore_signals_are_killed_after_the_grace(launch):
    run = launch(STUBBORN, num_workers=2, grace=1)
    run.pid_in("started_0"), run.pid_in("started_1")
    since = time.monotonic()
    run.process.send_signal(signal.SIGINT)
    run.output()
    assert time.monotonic() - since >= 1
    assert run.process.returncode == 130
    assert not run.survivors()


def test_interactive_rank_0_reads_stdin_and_decides_what_ctrl_c_ends(launch):
    run = launch(
        """
        with report_errors():
            try:
                note(f"started_{rank}")
                if rank:
                    assert sys.stdin.read() == ""
                    await_note("end")
                time.sleep(0 if rank else 100_000)
            except KeyboardInterrupt:
                print("heard", sys.stdin.readline().strip())
                note("end")
        """,
        num_workers=2,
        mode="interactive",
        stdin=subprocess.PIPE,
    )
    run.pid_in("started_0"), run.pid_in("started_1")
    run.process.stdin.write("a line\nanother\n")
    run.process.stdin.flush()
    run.process.send_signal(signal.SIGINT)
    stdout, stderr = run.output()
    assert (run.process.returncode, stdout, stderr) == (0, "heard a line\n", "")
    assert not run.survivors() and not run.leftovers()


@pytest.mark.parametrize("begin", ["with report_errors():", "if True:"])
def test_interactive_rank_0_that_ends_by_ctrl_c_ends_the_run(launch, begin):
    run = launch(
        f"""
        {begin}
            note(f"started_{{rank}}")
            time.sleep(100_000)
        """,
        num_workers=2,
        mode="interactive",
        grace=ENDLESS_SECONDS,
    )
    run.pid_in("started_0"), run.pid_in("started_1")
    run.process.send_signal(signal.SIGINT)
    _, stderr = run.output()
    assert run.process.returncode == 130
    assert stderr.endswith("interrupted by SIGINT; all 2 workers are stopped\n")
    assert not run.survivors()


def test_second_ctrl_c_does_not_wait_for_the_grace(launch):
    run = launch(
        """
        signal.signal(signal.SIGINT, lambda *_: note("told"))
        note(f"started_{rank}")
        time.sleep(100_000)
        """,
        num_workers=1,
        grace=ENDLESS_SECONDS,
    )
    run.pid_in("started_0")
    run.process.send_signal(signal.SIGINT)
    run.pid_in("told")
    run.process.send_signal(signal.SIGINT)
    run.output()
    assert run.process.returncode == 130
    assert not run.survivors()


def test_killed_launcher_takes_the_whole_run_with_it(launch):
    run = launch(STUBBORN, num_workers=2)
    run.pid_in("started_0"), run.pid_in("started_1")
    run.process.kill()
    wait_until(lambda: not run.survivors() and not run.leftovers(), "the end of the whole run")


@pytest.mark.parametrize("ending", ["raise RuntimeError('boom')", "pass"])
def test_grandchildren_go_whatever_session_they_are_in(launch, ending):
    run = launch(
        f"""
        import multiprocessing, subprocess
        note(f"started_{{rank}}")
        with report_errors():
            if rank == 1:
                manager = multiprocessing.get_context("fork").Manager()
                note_of = lambda name, pid: (here / name).write_text(str(pid))
                note_of("manager", manager._process.pid)
                sleeper = [sys.executable, "-c", "import time; time.sleep(100_000)"]
                note_of("sleeper", subprocess.Popen(sleeper, start_new_session=True).pid)
                {ending}
                os._exit(0)
            await_note("sleeper")
        """,
        num_workers=2,
    )
    manager, sleeper = run.pid_in("manager"), run.pid_in("sleeper")
    run.output()
    alive = run.survivors()
    assert manager not in alive and sleeper not in alive and not alive


def test_rank_without_a_report_gives_its_exit_code(launch):
    run = launch("sys.exit('no space') if rank == 1 else time.sleep(100_000)", num_workers=2)
    _, stderr = run.output()
    assert run.process.returncode == 1
    assert stderr.splitlines()[-2] == "no space"
    assert "rank 1 of 2 exited with code 1 and left no report" in stderr


def test_rank_told_to_stop_from_outside_fails_the_run(launch):
    run = launch(WAIT_FOR_EVER, num_workers=2)
    run.pid_in("started_0")
    os.kill(run.pid_in("started_1"), signal.SIGTERM)
    _, stderr = run.output()
    assert run.process.returncode == 128 + signal.SIGTERM
    assert "rank 1 of 2 exited with code 143" in stderr


def test_launcher_does_not_import_torch():
    code = "import sys, phi4.launch; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
