"""The check before any set-up: what is missing is named, with the command that mends it.

The script runs with a PATH of stand-in commands, one of which reports a broken machine.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "tools" / "check_machine.sh"
GOOD = {
    "uname": "case $1 in -s) echo Linux;; -m) echo x86_64;; esac",
    "getconf": "echo glibc 2.36",
    "df": "printf 'header\\nx 1 1 900000000 1 x\\n'",
    "id": "echo 1000",
    "apt-get": "exit 1",
    "python3": f'exec {sys.executable} "$@"',
}


class Machine:
    """A machine made of stand-ins."""

    def __init__(self, place: Path) -> None:
        self.place = place
        (place / "bin").mkdir()
        for name in ("awk", "cat", "sh"):
            (place / "bin" / name).symlink_to(shutil.which(name))
        for name, body in GOOD.items():
            self.set(name, body)
        self.memory(16)

    def set(self, name: str, body: str | None) -> None:
        file = self.place / "bin" / name
        file.unlink(missing_ok=True)
        if body is not None:
            file.write_text(f"#!/bin/sh\n{body}\n", encoding="utf-8")
            file.chmod(0o755)

    def memory(self, free_gib: int) -> None:
        text = f"MemTotal: 99999999 kB\nMemAvailable: {free_gib * 1024**2} kB\n"
        (self.place / "meminfo").write_text(text, encoding="utf-8")

    def check(self) -> subprocess.CompletedProcess[str]:
        variables = {
            "PATH": str(self.place / "bin"),
            "MEMINFO": str(self.place / "meminfo"),
            "CGROUP": str(self.place / "cgroup"),
            "HOME": os.environ.get("HOME", ""),
        }
        return subprocess.run(
            [str(self.place / "bin" / "sh"), str(SCRIPT)],
            env=variables,
            capture_output=True,
            text=True,
            check=False,
        )


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def old_python(version: str) -> str:
    major, minor = version.split(".")
    return (
        f'if [ "$1" = -V ]; then echo Python {version}; exit; fi\n'
        f'shift; exec {sys.executable} -c "import sys; sys.version_info = ({major}, {minor}); $1"'
    )


def test_good_machine_passes_and_names_its_python(machine: Machine) -> None:
    result = machine.check()
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.strip() == str(machine.place / "bin" / "python3")


@pytest.mark.parametrize(
    ("command", "body", "problem", "remedy"),
    [
        ("python3", None, "there is no python3", "apt-get install -y python3 python3-venv"),
        ("python3", old_python("3.10"), "python3 is Python 3.10", "docker run"),
        ("python3", old_python("3.14"), "python3 is Python 3.14", "docker run"),
        (
            "python3",
            f'case $2 in *ensurepip*) exit 1;; esac; exec {sys.executable} "$@"',
            "no venv with ensurepip",
            "sudo apt-get update && sudo apt-get install -y python3-venv",
        ),
        ("uname", "echo Darwin", "needs Linux", "docker run"),
        ("uname", "case $1 in -s) echo Linux;; *) echo riscv64;; esac", "this is riscv64", ""),
        ("getconf", "exit 1", "needs glibc", "docker run"),
        ("df", "printf 'h\\nx 1 1 4000000 1 x\\n'", "needs 5 GB of free disk here, 4 GB", ""),
    ],
)
def test_broken_machine_is_named_with_its_remedy(
    machine: Machine, command: str, body: str | None, problem: str, remedy: str
) -> None:
    machine.set(command, body)
    result = machine.check()
    assert result.returncode == 1
    assert problem in result.stderr
    assert remedy in result.stderr
    assert result.stdout == ""


def test_another_python_that_fits_is_taken(machine: Machine) -> None:
    machine.set("python3", old_python("3.10"))
    machine.set("python3.12", f'exec {sys.executable} "$@"')
    result = machine.check()
    assert result.stdout.strip() == str(machine.place / "bin" / "python3.12")


def test_root_needs_no_sudo(machine: Machine) -> None:
    machine.set("id", "echo 0")
    machine.set("python3", None)
    stderr = machine.check().stderr
    assert "fix it with:  apt-get update && apt-get install -y python3" in stderr


def test_little_memory_is_named(machine: Machine) -> None:
    machine.memory(5)
    assert "needs 6 GiB of free memory, 5 GiB are free" in machine.check().stderr


@pytest.mark.parametrize(
    ("limit", "passes"),
    [("3221225472", False), ("max", True), ("9223372036854771712", True), ("8589934592", True)],
)
def test_memory_limit_of_a_container_counts(machine: Machine, limit: str, passes: bool) -> None:
    (machine.place / "cgroup").mkdir()
    (machine.place / "cgroup" / "memory.max").write_text(limit, encoding="utf-8")
    result = machine.check()
    assert (result.returncode == 0) == passes
    assert passes or "3 GiB are free" in result.stderr


def test_all_problems_are_named_at_once(machine: Machine) -> None:
    machine.memory(1)
    machine.set("python3", None)
    stderr = machine.check().stderr
    assert "free memory" in stderr and "there is no python3" in stderr
