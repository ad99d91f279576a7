"""README's commands on a bare Debian: `make prove-fresh`, as root on a Debian with debootstrap.

For each Debian release a chroot gets README's apt line and nothing else, then a clone of HEAD, and
`make demo` and `make test` run in it as typed. One row per release and torch build is appended to
benchmarks/fresh.jsonl, also for a run that fails. Mounts and processes live in namespaces of their
own, so nothing stays mounted and nothing keeps running, however this ends.

    python3 tools/prove_fresh.py --debian bookworm trixie --torch default cpu --commands demo test

`default` is what pip takes without settings. `cpu` gives pip the wheels in --wheels, and is refused
where they hold no torch for the release's Python. Needs the standard library only.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ROWS = ROOT / "benchmarks" / "fresh.jsonl"
_IN_NAMESPACES = [
    "unshare",
    "--mount",
    "--pid",
    "--fork",
    "--kill-child",
    "--propagation",
    "private",
    "sh",
    "-c",
]
_ENTER = """
set -eu
mount -t proc proc "$1/proc"
mount --rbind /dev "$1/dev"
if [ -n "$3" ]; then mkdir -p "$1/wheels"; mount --bind -o ro "$3" "$1/wheels"; fi
exec chroot "$1" /usr/bin/env -i HOME=/home LANG=C.UTF-8 TERM=dumb \
    PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin $4 sh -c "$2"
"""
_FACTS = """
import importlib.metadata as m, json, platform
names = ("torch", "triton", "numpy", "megatron-core", "transformers")
print(json.dumps({"python": platform.python_version(), **{n: m.version(n) for n in names}}))
"""


class Chroot:
    """A bare system in a directory.

    Args:
        path: its root directory.
        wheels: a directory of the host that pip sees as its only setting; None for none.
    """

    def __init__(self, path: Path, wheels: Path | None) -> None:
        self.path = path
        self._wheels = wheels

    def run(self, script: str, log: Path) -> int:
        """Run a shell script as root inside; gives its exit status. Output goes to `log`."""
        settings = "PIP_FIND_LINKS=/wheels " if self._wheels else ""
        # Where the host's network needs its own certificate authority, the chroot's does too.
        if authority := os.environ.get("PIP_CERT"):
            shutil.copy(authority, self.path / "authority.pem")
            settings += "PIP_CERT=/authority.pem"
        arguments = [str(self.path), script, str(self._wheels or ""), settings]
        with log.open("wb") as stream:
            command = [*_IN_NAMESPACES, _ENTER, "sh", *arguments]
            done = subprocess.run(
                command, stdin=subprocess.DEVNULL, stdout=stream, stderr=subprocess.STDOUT
            )
        return done.returncode

    def read(self, script: str, log: Path) -> str:
        """Last line that a script prints.

        Raises:
            SystemExit: it failed.
        """
        if self.run(script, log):
            sys.exit(f"{script!r} failed in {self.path}; see {log}")
        return log.read_text().strip().splitlines()[-1]


def bare_system(release: str, directory: Path) -> Path:
    """Make a fresh copy of a Debian release; the original is made once per directory."""
    original, copy = directory / f"{release}.base", directory / f"{release}.fresh"
    if not original.exists():
        partial = directory / f"{release}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        subprocess.run(
            ["debootstrap", "--variant=minbase", release, str(partial)],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        partial.rename(original)
    shutil.rmtree(copy, ignore_errors=True)
    subprocess.run(["cp", "-a", "--reflink=auto", str(original), str(copy)], check=True)
    return copy


def apt_line() -> str:
    """Return the apt command of README."""
    found = re.search(r"`(apt-get install -y [\w .-]+)`", (ROOT / "README.md").read_text())
    assert found, "README names its apt line in backquotes"
    return found[1]


def prove(release: str, build: str, options: argparse.Namespace) -> dict[str, object]:
    """One row: the commands in one bare system."""
    wheels = options.wheels if build == "cpu" else None
    system = Chroot(bare_system(release, options.directory), wheels)
    logs = options.directory / f"{release}-{build}"
    logs.mkdir(exist_ok=True)
    system.read(f"apt-get update -qq && {apt_line()}", logs / "apt.log")
    clone = ["git", "clone", "--quiet", f"file://{ROOT}", str(system.path / "phi4")]
    subprocess.run(clone, check=True)
    row: dict[str, object] = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _git("rev-parse", "HEAD"),
        "debian": release,
        "torch_build": build,
        "cpus": os.cpu_count(),
        "commands": {},
    }
    for command in options.commands:
        started = time.monotonic()
        log = logs / f"{command}.log"
        status = system.run(f"cd /phi4 && make {command}", log)
        row["commands"][f"make {command}"] = {
            "exit_status": status,
            "seconds": round(time.monotonic() - started),
            "last_line": (log.read_text(errors="replace").strip().splitlines() or [""])[-1],
        }
        print(f"{release} {build}: make {command} exited with {status}; {log}", flush=True)
    facts = system.read(f"cd /phi4 && .venv/bin/python -c '{_FACTS}'", logs / "facts.log")
    shutil.rmtree(system.path)
    return row | {"versions": json.loads(facts)}


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, check=True, text=True)
    return done.stdout.strip()


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--debian", nargs="+", default=["bookworm", "trixie"], help="releases")
    parser.add_argument("--torch", nargs="+", choices=("default", "cpu"), default=["default"])
    parser.add_argument("--commands", nargs="+", choices=("demo", "test"), default=["demo", "test"])
    parser.add_argument("--wheels", type=Path, help="wheels of torch's CPU build, for --torch cpu")
    parser.add_argument("--directory", type=Path, default=Path("/var/tmp/phi4-fresh"))
    options = parser.parse_args()
    if os.geteuid() or not shutil.which("debootstrap"):
        parser.error("needs root and debootstrap: apt-get install -y debootstrap")
    if "cpu" in options.torch and not options.wheels:
        parser.error("--torch cpu needs --wheels, a directory with torch's CPU build")
    if _git("status", "--porcelain", "--untracked-files=no"):
        parser.error("the checkout has changes; commit them, a clone of HEAD is what is proven")
    return options


def main() -> int:
    """Append a row per system; exit with 1 when a command failed."""
    options = _options()
    options.directory.mkdir(parents=True, exist_ok=True)
    failed = False
    for release in options.debian:
        for build in options.torch:
            row = prove(release, build, options)
            with ROWS.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(row) + "\n")
            failed |= any(done["exit_status"] for done in row["commands"].values())
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
